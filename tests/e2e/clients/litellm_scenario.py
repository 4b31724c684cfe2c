"""LiteLLM against a server: completion, stream, tools, text completion, embedding, and an error of its own kind."""

import json
import sys

import litellm

COMMON = {"model": "openai/pydoc-mini", "api_base": f"{sys.argv[1]}/v1", "api_key": "none", "num_retries": 0}
MESSAGES = [{"role": "user", "content": "What does json.dumps do?"}]
TOOL = {"type": "function", "function": {"name": "ping", "parameters": {"type": "object", "properties": {}}}}

whole = litellm.completion(**COMMON, messages=MESSAGES, temperature=0)
chunks = list(litellm.completion(**COMMON, messages=MESSAGES, temperature=0, stream=True))
called = litellm.completion(**COMMON, messages=MESSAGES, tools=[TOOL], tool_choice="required", max_tokens=100)
text = litellm.text_completion(
    **{**COMMON, "model": "text-completion-openai/pydoc-mini"}, prompt="def ", max_tokens=4, temperature=0
)
vector = litellm.embedding(**COMMON, input=["one", "two"], encoding_format="float")
try:
    litellm.completion(**COMMON, messages=[{"role": "user", "content": "a " * 9000}])
    refused = ""
except litellm.ContextWindowExceededError as exc:
    refused = str(exc)
print(
    json.dumps(
        {
            "whole": whole.choices[0].message.content,
            "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
            "completion_tokens": whole.usage.completion_tokens,
            "called": called.choices[0].message.tool_calls[0].function.name,
            "text": text.choices[0].text,
            "vectors": [len(entry["embedding"]) for entry in vector.data],
            "refused": refused,
        }
    )
)
