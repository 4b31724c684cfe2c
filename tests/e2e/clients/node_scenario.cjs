// OpenAI's Node client against a server: chat, stream, tools, a response, a stream that is given up, an error.
const OpenAI = require("openai").default;

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const model = "pydoc-mini";
const messages = [{ role: "user", content: "What does json.dumps do?" }];
const tools = [{ type: "function", function: { name: "ping", parameters: { type: "object", properties: {} } } }];

async function main() {
  const whole = await client.chat.completions.create({ model, messages, temperature: 0 });
  let streamed = "";
  let usage = null;
  const options = { stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client.chat.completions.create({ model, messages, temperature: 0, ...options })) {
    streamed += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  const called = await client.chat.completions.create({ model, messages, tools, tool_choice: "required", max_tokens: 100 });
  const response = await client.responses.create({ model, input: messages[0].content, temperature: 0 });
  const long = await client.completions.create({ model, prompt: "x", max_tokens: 2000, stream: true, ignore_eos: true });
  let events = 0;
  for await (const event of long) {
    events += event.choices.length;
    if (events === 3) break;
  }
  const models = [];
  for await (const one of client.models.list()) models.push(one.id);
  let refused = null;
  try {
    await client.chat.completions.create({ model: "gpt-9", messages });
  } catch (error) {
    refused = { isNotFound: error instanceof OpenAI.NotFoundError, message: error.message };
  }
  const seen = {
    whole: whole.choices[0].message.content,
    streamed,
    usage: usage.completion_tokens,
    called: called.choices[0].message.tool_calls[0].function.name,
    response: response.output_text,
    events,
    models,
    refused,
  };
  console.log(JSON.stringify(seen));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
