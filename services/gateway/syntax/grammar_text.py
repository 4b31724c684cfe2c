"""From what a client wants its output to look like to one grammar in llguidance's format.

response_format, structured_outputs, guided_* --> Structure --+
tools, tool_choice                            --> CallRules --+--> grammar text --> the decode worker
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import llguidance

from services.gateway.syntax.families import ToolFamily
from services.gateway.syntax.schema_references import moved

_WHITE_SPACE = r"\n?[ \t]{0,8}"
"""Between JSON tokens. Bounded, so that no model runs to its limit on blanks."""

_NO_ARGUMENTS: Mapping[str, object] = {"type": "object", "properties": {}, "additionalProperties": False}


class StructureKind(Enum):
    """How a structure is described."""

    JSON = "json"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class Structure:
    """What the answer must look like.

    Attributes:
        source: A JSON schema, a regular expression, a list of texts, or a grammar (Lark or GBNF).
        field: Of the request, for errors.
        white_space: Regular expression for white space in JSON; "" = none; None = some.
    """

    kind: StructureKind
    source: object
    field: str
    white_space: str | None = None


@dataclass(frozen=True, slots=True)
class Function:
    """A function that may be called; `parameters` None = no arguments."""

    name: str
    parameters: Mapping[str, object] | None
    is_strict: bool = False


@dataclass(frozen=True, slots=True)
class CallRules:
    """What may be called.

    Attributes:
        marks: How the grammar spells the family's marks: as a literal, or as a special token.
        is_required: There must be a call.
        max_calls: 1 or None.
    """

    family: ToolFamily
    functions: Sequence[Function]
    marks: Mapping[str, str]
    is_required: bool
    max_calls: int | None = None
    has_args_mark: bool = False


def grammar_text(structure: Structure | None, calls: CallRules | None) -> str:
    """The grammar; "" where nothing is to be kept to.

    Raises:
        ValueError: The structure is no such thing as it says; the message is for the client.
    """
    grammars: list[dict[str, object]] = []
    if structure is not None:
        grammars.append(_structure_grammar(structure))
    if calls is not None and (calls.is_required or structure is not None or any(f.is_strict for f in calls.functions)):
        grammars.insert(0, {"name": "reply", "lark_grammar": _call_grammar(calls, has_structure=structure is not None)})
    return json.dumps({"grammars": grammars}) if grammars else ""


def _structure_grammar(structure: Structure) -> dict[str, object]:
    source = structure.source
    match structure.kind:
        case StructureKind.JSON:
            return {"name": "structure", "json_schema": _with_options(source, structure.white_space)}
        case StructureKind.REGEX:
            lark = f"start: /{llguidance.regex_to_lark(str(source))}/"
        case StructureKind.CHOICE:
            assert isinstance(source, list)
            lark = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in source)
        case StructureKind.GRAMMAR:
            lark = _as_lark(str(source))
    return {"name": "structure", "lark_grammar": lark}


def _as_lark(text: str) -> str:
    if "::=" not in text:
        return text
    try:
        return llguidance.gbnf_to_lark.any_to_lark(text)
    except Exception as exc:  # the converter has no error class of its own
        raise ValueError(f"not understood as GBNF: {exc}") from exc


def _with_options(schema: object, white_space: str | None = None) -> dict[str, object]:
    """The schema with our options in the place of any that it brings."""
    options: dict[str, object] = {"lenient": False, "coerce_one_of": False}
    if white_space == "":
        options["whitespace_flexible"] = False
    else:
        options["whitespace_pattern"] = white_space or _WHITE_SPACE
    if not isinstance(schema, dict):
        return {"allOf": [schema], "x-guidance": options} if schema is False else {"x-guidance": options}
    return {**schema, "x-guidance": options}


def _call_grammar(calls: CallRules, *, has_structure: bool) -> str:
    calls_rule, rules = _FAMILIES[calls.family](calls)
    if calls.is_required:
        start = calls_rule
    elif has_structure:
        start = f"{calls_rule} | @structure"
    else:
        start, rules = _optional(calls, rules)
    return "\n".join([f"start: {start}", *rules])


def _optional(calls: CallRules, rules: list[str]) -> tuple[str, list[str]]:
    """Text in which whatever begins as a call becomes a proper one."""
    rules = [*rules, "TEXT: /(.|\\n)*/"]
    match calls.family:
        case ToolFamily.LLAMA3_JSON:
            return "all_calls | OTHER", [*rules, "OTHER: /([^{](.|\\n)*)?/"]
        case ToolFamily.HERMES:
            mark = calls.marks["<tool_call>"]
            tail = '/[ \\n]*/ object /[ \\n]*/ "</tool_call>"'
        case ToolFamily.MISTRAL:
            mark, tail = calls.marks["[TOOL_CALLS]"], "/ */ call_tail"
    if mark.startswith("<["):
        rules.append(f"tag: TEXT {mark} {tail}")
    else:
        rules += [f"tag_head[lazy]: TEXT {mark}", f"tag: tag_head {tail}"]
    return ("tag? TEXT" if calls.max_calls == 1 else "tag* TEXT"), rules


def _repeated(rule: str, separator: str, calls: CallRules) -> str:
    return rule if calls.max_calls == 1 else f"{rule} ({separator} {rule})*"


def _hermes(calls: CallRules) -> tuple[str, list[str]]:
    mark = calls.marks["<tool_call>"]
    return "all_calls", [
        f"all_calls: {_repeated('call', json.dumps(chr(10)), calls)}",
        f'call: {mark} "\\n" object "\\n</tool_call>"',
        f"object: %json {json.dumps(_call_schema(calls.functions, 'arguments'))}",
    ]


def _llama(calls: CallRules) -> tuple[str, list[str]]:
    return "all_calls", [
        f"all_calls: {_repeated('object', json.dumps('; '), calls)}",
        f"object: %json {json.dumps(_call_schema(calls.functions, 'parameters'))}",
    ]


def _mistral(calls: CallRules) -> tuple[str, list[str]]:
    mark = calls.marks["[TOOL_CALLS]"]
    if not calls.has_args_mark:
        call = _call_schema(calls.functions, "arguments")
        items = {"anyOf": call["anyOf"]}
        array: dict[str, object] = {"type": "array", "items": items, "minItems": 1, "$defs": call["$defs"]}
        if calls.max_calls is not None:
            array["maxItems"] = calls.max_calls
        return "all_calls", [f"all_calls: {mark} call_tail", f"call_tail: %json {json.dumps(_with_options(array))}"]
    rules = [
        f"{_call_rule(i)}: {json.dumps(function.name)} {calls.marks['[ARGS]']} %json "
        + json.dumps(_with_options(dict(function.parameters or _NO_ARGUMENTS)))
        for i, function in enumerate(calls.functions)
    ]
    tails = " | ".join(_call_rule(i) for i in range(len(calls.functions)))
    return "all_calls", [
        f"all_calls: {'call' if calls.max_calls == 1 else 'call+'}",
        f"call: {mark} call_tail",
        f"call_tail: {tails}",
        *rules,
    ]


def _call_rule(number: int) -> str:
    return f"call_{number}"


def _call_schema(functions: Sequence[Function], arguments_key: str) -> dict[str, object]:
    """A call of one of the functions."""
    alternatives: list[object] = []
    definitions: dict[str, object] = {}
    for number, function in enumerate(functions):
        definitions[str(number)] = moved(dict(function.parameters or _NO_ARGUMENTS), f"#/$defs/{number}")
        alternatives.append(
            {
                "type": "object",
                "properties": {"name": {"const": function.name}, arguments_key: {"$ref": f"#/$defs/{number}"}},
                "required": ["name", arguments_key],
                "additionalProperties": False,
            }
        )
    return _with_options({"anyOf": alternatives, "$defs": definitions})


_FAMILIES = {ToolFamily.HERMES: _hermes, ToolFamily.LLAMA3_JSON: _llama, ToolFamily.MISTRAL: _mistral}
