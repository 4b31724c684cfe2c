"""Every family through the gateway: a template of its documented form, what its models write, and the way back.

Templates and outputs are our own words in the published formats: `templates/` has one template of each family.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.gateway.served_model import load_model
from services.gateway.settings import GatewaySettings
from services.gateway.syntax.families import ToolFamily
from shared.identity import unpack_tokens

MODEL = "pydoc-mini"
TEMPLATES = Path(__file__).parent / "templates"
USER = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wetter in Köln und Rom?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city, today.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
COLOGNE, ROME = {"city": "Köln", "unit": "C"}, {"city": 'Rom "Fiumicino" {1}'}


def dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Output:
    """What a model of the family writes, and what a client is to see."""

    template: str
    written: str
    content: str | None
    calls: tuple[tuple[str, dict], ...] = ()
    reasoning: str | None = None
    finish: str = "tool_calls"


HERMES_CALLS = "\n".join(
    f'<tool_call>\n{{"name": "get_weather", "arguments": {dumps(arguments)}}}\n</tool_call>'
    for arguments in (COLOGNE, ROME)
)
BOTH = (("get_weather", COLOGNE), ("get_weather", ROME))
OUTPUTS = {
    "hermes: two calls": Output("hermes", HERMES_CALLS, None, BOTH),
    "hermes: words, then a call": Output(
        "hermes",
        f'Ich sehe nach. 🌦\n\n<tool_call>\n{{"name": "get_weather", "arguments": {dumps(COLOGNE)}}}\n</tool_call>',
        "Ich sehe nach. 🌦",
        BOTH[:1],
    ),
    "hermes: reasons, then calls": Output(
        "hermes",
        f"<think>\nThe user wants two cities.\nI call <tool_call> twice, for 1 < 2.\n</think>\n\n{HERMES_CALLS}",
        None,
        BOTH,
        "The user wants two cities.\nI call <tool_call> twice, for 1 < 2.",
    ),
    "hermes: reasons, then answers": Output(
        "hermes", "<think>\n\n</think>\n\nEs regnet.", "Es regnet.", finish="stop"
    ),
    "hermes: no arguments": Output(
        "hermes", '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', None, (("now", {}),)
    ),
    "hermes: talks about marks": Output(
        "hermes", "Write <tool_call> and a <think> to call.", "Write <tool_call> and a <think> to call.", finish="stop"
    ),
    "llama: one call": Output(
        "llama3", f'{{"name": "get_weather", "parameters": {dumps(COLOGNE)}}}', None, BOTH[:1]
    ),
    "llama: type first": Output(
        "llama3",
        f'{{"type": "function", "name": "get_weather", "parameters": {dumps(ROME)}}}',
        None,
        BOTH[1:],
    ),
    "llama: tag and two calls": Output(
        "llama3",
        "<|python_tag|>"
        + "; ".join(f'{{"name": "get_weather", "parameters": {dumps(a)}}}' for a in (COLOGNE, ROME)),
        None,
        BOTH,
    ),
    "llama: JSON that is no call": Output(
        "llama3", '{"temperature": 21, "unit": "C"}', '{"temperature": 21, "unit": "C"}', finish="stop"
    ),
    "llama: words": Output("llama3", "In Köln regnet es {leicht}.", "In Köln regnet es {leicht}.", finish="stop"),
    "mistral: an array with ids": Output(
        "mistral",
        "[TOOL_CALLS] "
        + dumps([{"name": "get_weather", "arguments": a, "id": f"x{i}bcdefgh"} for i, a in enumerate((COLOGNE, ROME))]),
        None,
        BOTH,
    ),
    "mistral: words, then an array": Output(
        "mistral",
        "Moment. [TOOL_CALLS] [" + dumps({"name": "get_weather", "arguments": COLOGNE}) + "]",
        "Moment.",
        BOTH[:1],
    ),
    "mistral: words": Output("mistral", "[Siehe oben] 20 °C.", "[Siehe oben] 20 °C.", finish="stop"),
    "mistral, newer: two calls": Output(
        "mistral_args",
        f"[TOOL_CALLS]get_weather[ARGS]{dumps(COLOGNE)}[TOOL_CALLS]get_weather[ARGS]{dumps(ROME)}",
        None,
        BOTH,
    ),
    "mistral, newer: reasons, then a call": Output(
        "mistral_args",
        f"[THINK]Zwei Städte?[/THINK][TOOL_CALLS]get_weather[ARGS]{dumps(COLOGNE)}",
        None,
        BOTH[:1],
        "Zwei Städte?",
    ),
    "deepseek: the prompt opened reasoning": Output(
        "deepseek", "Hm, 2 < 3.\n</think>\n\nJa.", "Ja.", (), "Hm, 2 < 3.", finish="stop"
    ),
}  # fmt: skip
FAMILIES = {
    "hermes": (ToolFamily.HERMES, "<think>"),
    "llama3": (ToolFamily.LLAMA3_JSON, None),
    "mistral": (ToolFamily.MISTRAL, None),
    "mistral_args": (ToolFamily.MISTRAL, "[THINK]"),
    "deepseek": (None, "<think>"),
}


@pytest.fixture
def model_of():
    """`model_of(template)`: the bundled model, as if it had been trained on that template; auto-detected."""

    def load(template: str):
        # The architecture of the bundled model says Hermes, so what is found is found by the template.
        return load_model(
            GatewaySettings(model="shared/assets/pydoc-mini", chat_template=TEMPLATES / f"{template}.jinja"), created=1
        )

    return load


@pytest.mark.parametrize("template", FAMILIES)
def test_family_is_known_by_its_template(model_of, template):
    syntax = model_of(template).syntax
    assert (syntax.tools, syntax.reasoning and syntax.reasoning.start) == FAMILIES[template]
    assert syntax.has_args_mark == (template == "mistral_args")


@pytest.mark.parametrize("name", OUTPUTS)
async def test_what_a_model_writes_is_read_whole_and_streamed(start_gateway, model_of, text_ids, name):
    output = OUTPUTS[name]
    tools = {"tools": TOOLS} if FAMILIES[output.template][0] else {}
    async with start_gateway(model_override=model_of(output.template)) as running:
        running.worker.script.token_ids = text_ids(output.written)
        create = running.openai.chat.completions.create
        choice = (await create(model=MODEL, messages=USER, **tools)).choices[0]
        message = choice.message
        assert (message.content, choice.finish_reason) == (output.content, output.finish)
        assert getattr(message, "reasoning_content", None) == output.reasoning
        calls = [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls or ()]
        assert calls == list(output.calls)
        assert len({c.id for c in message.tool_calls or ()}) == len(calls)
        content, reasoning, pieces = "", "", {}
        async for chunk in await create(model=MODEL, messages=USER, stream=True, **tools):
            delta = chunk.choices[0].delta
            content += delta.content or ""
            reasoning += getattr(delta, "reasoning_content", None) or ""
            for piece in delta.tool_calls or ():
                call = pieces.setdefault(piece.index, ["", ""])
                call[0] += piece.function.name or ""
                call[1] += piece.function.arguments or ""
        assert (content or None, reasoning or None) == (output.content, output.reasoning)
        assert [(name, json.loads(arguments)) for name, arguments in pieces.values()] == list(output.calls)


ROUND_TRIP = {
    "hermes": ['<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "unit": "C"}}\n</tool_call>',
               "<tool_response>\n12 °C\n</tool_response>", '"name": "now"'],
    "llama3": ['{"name": "get_weather", "parameters": {"city": "Köln", "unit": "C"}}<|eot_id|>',
               "ipython<|end_header_id|>\n\n12 °C", '"name": "now"'],
    "mistral": ['[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Köln", "unit": "C"}, "id": "',
                '[TOOL_RESULTS] {"content": "12 °C", "call_id": "', '[AVAILABLE_TOOLS] [{"type": "function"'],
    "mistral_args": ['[TOOL_CALLS]get_weather[ARGS]{"city": "Köln", "unit": "C"}', "[TOOL_RESULTS]12 °C"],
}  # fmt: skip


@pytest.mark.parametrize("template", ROUND_TRIP)
async def test_calls_and_results_go_back_into_the_prompt_as_the_model_wrote_them(
    start_gateway, model_of, model_files, text_ids, template
):
    output = next(
        o for o in OUTPUTS.values() if o.template == template and len(o.calls) == 1 and "now" not in o.written
    )
    async with start_gateway(model_override=model_of(template)) as running:
        running.worker.script.token_ids = text_ids(output.written.replace(dumps(ROME), dumps(COLOGNE)))
        create = running.openai.chat.completions.create
        message = (await create(model=MODEL, messages=USER, tools=TOOLS)).choices[0].message
        assert message.tool_calls, output.written
        history = [
            *USER,
            message.model_dump(include={"role", "content", "tool_calls"}, exclude_none=True),
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "12 °C"},
        ]
        await create(model=MODEL, messages=history, tools=TOOLS)
        prompt = model_files.decode(unpack_tokens(running.worker.submits[-1].prompt_tokens))
        for part in ROUND_TRIP[template]:
            assert part in prompt


@pytest.mark.parametrize("template", ["hermes", "llama3", "mistral", "mistral_args"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "now"}}], ids=["any", "now"])
async def test_a_required_call_is_a_grammar_in_the_familys_own_form(start_gateway, model_of, template, choice):
    async with start_gateway(model_override=model_of(template)) as running:
        await running.openai.chat.completions.create(model=MODEL, messages=USER, tools=TOOLS, tool_choice=choice)
        grammar = running.worker.submits[-1].sampling.grammar
    mark = {"hermes": "<tool_call>", "llama3": "parameters", "mistral": "[TOOL_CALLS]", "mistral_args": "[ARGS]"}
    assert mark[template] in grammar
    assert "now" in grammar
    assert ("get_weather" in grammar) == (choice == "required")


@pytest.mark.parametrize("mode", ["auto", "required"])
async def test_only_allowed_tools_are_offered(start_gateway, model_of, model_files, mode):
    allowed = {"mode": mode, "tools": [{"type": "function", "function": {"name": "now"}}]}
    async with start_gateway(model_override=model_of("hermes")) as running:
        await running.openai.chat.completions.create(
            model=MODEL, messages=USER, tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": allowed}
        )
        submit = running.worker.submits[-1]
        flat = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "now"}]}
        tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
        fields = {"model": MODEL, "input": "x", "tools": tools, "tool_choice": flat}
        reply = await running.http.post("/v1/responses", json=fields)
        assert reply.status_code == 200, reply.text
        other = running.worker.submits[-1]
        fields["tool_choice"]["tools"][0]["name"] = "nothing"
        refused = await running.http.post("/v1/responses", json=fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")
    for one in (submit, other):
        prompt = model_files.decode(unpack_tokens(one.prompt_tokens))
        assert '"now"' in prompt
        assert "get_weather" not in prompt
        assert bool(one.sampling.grammar) == (mode == "required")
        assert "get_weather" not in one.sampling.grammar


async def test_templates_refusal_reaches_the_client_in_its_own_words(start_gateway, model_of):
    twice = [*USER, USER[1]]
    async with start_gateway(model_override=model_of("mistral")) as running:
        reply = await running.http.post("/v1/chat/completions", json={"model": MODEL, "messages": twice})
        assert reply.status_code == 400
        assert "user and assistant must take turns" in reply.json()["error"]["message"]


async def test_thinking_is_switched_off_by_variable_and_by_effort(start_gateway, model_of, model_files):
    async with start_gateway(model_override=model_of("hermes")) as running:
        for fields in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}, {}):
            await running.openai.chat.completions.create(model=MODEL, messages=USER, extra_body=fields)
            prompt = model_files.decode(unpack_tokens(running.worker.submits[-1].prompt_tokens))
            assert prompt.endswith("<think>\n\n</think>\n\n") == bool(fields)
