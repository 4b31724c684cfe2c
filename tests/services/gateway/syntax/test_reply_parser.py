"""Replies are told into answer, reasoning and calls, however their text was cut."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.syntax.families import ReasoningMarks, ToolFamily
from services.gateway.syntax.reply_parser import ReplyParser, ReplySyntax

THINK = ReasoningMarks("<think>", "</think>")


def read(text: str, cuts: list[int] = (), **syntax):
    """Answer, reasoning, calls as (name, arguments)."""
    parser = ReplyParser(ReplySyntax(**syntax))
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    found = [parser.push(text[a:b]) for a, b in pairwise(borders)] + [parser.finish()]
    calls: dict[int, list[str]] = {}
    for piece in (call for pieces in found for call in pieces.calls):
        if piece.name is not None:
            assert piece.index == len(calls)
            assert piece.arguments == ""
            calls[piece.index] = [piece.name, ""]
        calls[piece.index][1] += piece.arguments
    return "".join(p.text for p in found), "".join(p.reasoning for p in found), [tuple(call) for call in calls.values()]


WEATHER = '{"city": "K\\u00f6ln \\"}{\\"", "days": [1, {"x": 2}]}'
CASES = [
    (ToolFamily.HERMES, "plain words < and <tool> too", "plain words < and <tool> too", []),
    (ToolFamily.HERMES, f'<tool_call>\n{{"name": "w", "arguments": {WEATHER}}}\n</tool_call>', "", [("w", WEATHER)]),
    (
        ToolFamily.HERMES,
        f'I look. \n<tool_call>{{"arguments": {WEATHER}, "name": "w"}}</tool_call>\n'
        '<tool_call>\n{"name": "p"}\n</tool_call> Done. ',
        "I look.Done.",
        [("w", WEATHER), ("p", "{}")],
    ),
    (ToolFamily.HERMES, '<tool_call>{"name": "p", "arguments": "{\\"a\\": 1}"}', "", [("p", '{"a": 1}')]),
    (ToolFamily.HERMES, "<tool_call> no JSON", "<tool_call> no JSON", []),
    (ToolFamily.HERMES, '<tool_call>{"x": 1}</tool_call>', '<tool_call>{"x": 1}</tool_call>', []),
    (ToolFamily.HERMES, '<tool_call>{"name": "p", "arguments": {"a": 1', "", [("p", '{"a": 1')]),
    (ToolFamily.HERMES, '<tool_call>{"name": "p"}<tool_call>{"name": "q"}', "", [("p", "{}"), ("q", "{}")]),
    (ToolFamily.LLAMA3_JSON, "plain {words}", "plain {words}", []),
    (ToolFamily.LLAMA3_JSON, f'{{"name": "w", "parameters": {WEATHER}}}', "", [("w", WEATHER)]),
    (
        ToolFamily.LLAMA3_JSON,
        '<|python_tag|>{"name": "a", "parameters": {}}; {"name": "b", "parameters": null}',
        "",
        [("a", "{}"), ("b", "{}")],
    ),
    (ToolFamily.LLAMA3_JSON, '{"answer": 42} it is', '{"answer": 42} it is', []),
    (ToolFamily.LLAMA3_JSON, '{"name": "a", "parameters": {}} and more', "and more", [("a", "{}")]),
    (ToolFamily.MISTRAL, "plain [words]", "plain [words]", []),
    (
        ToolFamily.MISTRAL,
        f'Yes. [TOOL_CALLS] [{{"name": "w", "arguments": {WEATHER}}}, {{"name": "p", "arguments": {{}}}}]',
        "Yes.",
        [("w", WEATHER), ("p", "{}")],
    ),
    (
        ToolFamily.MISTRAL,
        f"[TOOL_CALLS]w[CALL_ID]123456789[ARGS]{WEATHER}[TOOL_CALLS]p[ARGS]{{}}",
        "",
        [("w", WEATHER), ("p", "{}")],
    ),
    (ToolFamily.MISTRAL, f"[TOOL_CALLS]w{WEATHER}", "", [("w", WEATHER)]),
    (ToolFamily.MISTRAL, "[TOOL_CALLS] [nothing", "[TOOL_CALLS] [nothing", []),
]


@pytest.mark.parametrize(("family", "text", "answer", "calls"), CASES, ids=range(len(CASES)))
def test_calls_are_told_from_text(family, text, answer, calls):
    assert read(text, tools=family) == (answer, "", calls)
    for _, arguments in calls:
        if not text.endswith('{"a": 1'):
            json.loads(arguments)


@given(case=st.sampled_from(CASES), cuts=st.lists(st.integers(0, 160), max_size=12))
def test_calls_do_not_depend_on_how_the_text_was_cut(case, cuts):
    family, text, answer, calls = case
    assert read(text, cuts, tools=family) == (answer, "", calls)


@given(
    family=st.sampled_from(ToolFamily),
    text=st.text(alphabet='<tool_ca>/{}[]TOLS"name: agumets,;\\ \n', max_size=80),
    cuts=st.lists(st.integers(0, 80), max_size=8),
)
def test_no_text_breaks_a_parser(family, text, cuts):
    assert read(text, cuts, tools=family, reasoning=THINK) == read(text, tools=family, reasoning=THINK)


def test_one_call_at_most_where_no_more_are_wanted():
    text = '<tool_call>{"name": "p"}</tool_call><tool_call>{"name": "q", "arguments": {"x": 1}}</tool_call>'
    assert read(text, tools=ToolFamily.HERMES, max_calls=1) == ("", "", [("p", "{}")])


@pytest.mark.parametrize(
    ("text", "is_thinking", "answer", "reasoning"),
    [
        ("<think>\nhm, 2 < 3\n</think>\n\nYes.", False, "Yes.", "hm, 2 < 3"),
        ("hm</think>Yes. ", True, "Yes. ", "hm"),
        ("<think>hm</think>Yes", True, "Yes", "hm"),
        ("Yes <think>", False, "Yes <think>", ""),
        ("<think>never closed </th", False, "", "never closed </th"),
        ("  plain", False, "  plain", ""),
        ("<thin", False, "<thin", ""),
        ("", False, "", ""),
    ],
)
@given(cuts=st.lists(st.integers(0, 40), max_size=6))
def test_reasoning_is_told_from_the_answer(text, is_thinking, answer, reasoning, cuts):
    assert read(text, cuts, reasoning=THINK, is_thinking=is_thinking) == (answer, reasoning, [])


def test_reasoning_is_dropped_where_it_is_not_wanted():
    text = '<think>hm</think>\n<tool_call>{"name": "p"}</tool_call>'
    assert read(text, reasoning=THINK, tools=ToolFamily.HERMES, shows_reasoning=False) == ("", "", [("p", "{}")])
