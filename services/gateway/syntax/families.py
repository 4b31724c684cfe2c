"""How model families write tool calls and reasoning, and which family a checkpoint is of."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from shared.errors import ConfigurationError

ToolParserName = Literal["auto", "none", "hermes", "llama3_json", "mistral"]
ReasoningParserName = Literal["auto", "none", "qwen3", "deepseek_r1", "mistral"]


class ToolFamily(Enum):
    """How tool calls are written; vLLM's names.

    HERMES:      <tool_call> {"name": ..., "arguments": {...}} </tool_call>, any number, text before
    LLAMA3_JSON: {"name": ..., "parameters": {...}}, separated by ";", nothing before but <|python_tag|>
    MISTRAL:     [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...], or [TOOL_CALLS] name [ARGS] {...}, text before
    """

    HERMES = "hermes"
    LLAMA3_JSON = "llama3_json"
    MISTRAL = "mistral"

    @property
    def marks(self) -> tuple[str, ...]:
        """What begins a call; shown to the parser even where it is a special token."""
        return _TOOL_MARKS[self]

    def new_call_id(self) -> str:
        """A name for a call; Mistral's templates insist on nine letters and digits."""
        return secrets.token_hex(5)[:9] if self is ToolFamily.MISTRAL else f"call_{secrets.token_hex(12)}"


_TOOL_MARKS = {
    ToolFamily.HERMES: ("<tool_call>", "</tool_call>"),
    ToolFamily.LLAMA3_JSON: ("<|python_tag|>",),
    ToolFamily.MISTRAL: ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
}


@dataclass(frozen=True, slots=True)
class ReasoningMarks:
    """What encloses reasoning.

    Attributes:
        is_implied: Every output begins inside of reasoning, whether or not the start mark was written.
    """

    start: str
    end: str
    is_implied: bool = False


@dataclass(frozen=True, slots=True)
class ModelSyntax:
    """What a checkpoint writes; None = it does not."""

    tools: ToolFamily | None = None
    reasoning: ReasoningMarks | None = None
    has_args_mark: bool = False
    """Mistral's newer form, `name [ARGS] {...}`."""


_REASONING = {
    "qwen3": ReasoningMarks("<think>", "</think>"),
    "deepseek_r1": ReasoningMarks("<think>", "</think>", is_implied=True),
    "mistral": ReasoningMarks("[THINK]", "[/THINK]"),
}


def model_syntax(
    template: str, model_type: str, tool_parser: ToolParserName, reasoning_parser: ReasoningParserName
) -> ModelSyntax:
    """Chooses by the operator's word, else by what the chat template itself writes, else by the architecture.

    Args:
        template: Source of the chat template; "" = none, and then nothing is chosen by itself.
        model_type: Of the checkpoint's config.json.
        tool_parser: As configured.
        reasoning_parser: As configured.

    Raises:
        ConfigurationError: A parser was named and there is no chat template.
    """
    if not template:
        if tool_parser not in ("auto", "none"):
            raise ConfigurationError(f"tool parser {tool_parser!r}: the model has no chat template")
        return ModelSyntax()
    return ModelSyntax(
        tools=_tool_family(template, model_type, tool_parser),
        reasoning=_reasoning_marks(template, reasoning_parser),
        has_args_mark="[ARGS]" in template,
    )


def _tool_family(template: str, model_type: str, name: ToolParserName) -> ToolFamily | None:
    if name == "none":
        return None
    if name != "auto":
        return ToolFamily(name)
    if "<tool_call>" in template:
        return ToolFamily.HERMES
    if "[TOOL_CALLS]" in template:
        return ToolFamily.MISTRAL
    if "tools" not in template:
        return None
    if "python_tag" in template or ('"parameters": ' in template and model_type == "llama"):
        return ToolFamily.LLAMA3_JSON
    by_type = {"qwen2": ToolFamily.HERMES, "qwen3": ToolFamily.HERMES, "mistral": ToolFamily.MISTRAL}
    return by_type.get(model_type)


def _reasoning_marks(template: str, name: ReasoningParserName) -> ReasoningMarks | None:
    if name == "none":
        return None
    if name != "auto":
        return _REASONING[name]
    return next((marks for marks in _REASONING.values() if marks.end in template), None)
