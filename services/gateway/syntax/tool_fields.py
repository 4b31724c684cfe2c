"""`tools`, `tool_choice` and `parallel_tool_calls`, read and held to their limits."""

from __future__ import annotations

from services.gateway.schemas.chat import ChatBody
from services.gateway.schemas.tools import AllowedToolsChoice, NamedToolChoice, Tool, ToolChoice
from services.gateway.settings import GatewaySettings
from services.gateway.syntax.families import ModelSyntax, ToolFamily
from services.gateway.syntax.grammar_text import CallRules, Function
from services.gateway.syntax.structure_fields import check_schema
from shared.errors import InvalidRequest, UnsupportedField
from shared.tokenization.tokenizer import Tokenizer


def offered_tools(body: ChatBody, syntax: ModelSyntax, settings: GatewaySettings) -> list[Tool]:
    """The tools that the model is told of; none where it shall call none.

    Raises:
        UnsupportedField: The model's chat template knows no tools.
        InvalidRequest: Too many tools, two of one name, or a choice that is not among them.
    """
    tools, choice = body.tools or [], body.tool_choice
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("'tool_choice' needs 'tools'", param="tool_choice")
        return []
    if syntax.tools is None:
        raise UnsupportedField("'tools' is not supported: the model's chat template has no place for it", param="tools")
    if len(tools) > settings.max_tools:
        raise InvalidRequest(f"{len(tools)} tools, at most {settings.max_tools} are served", param="tools")
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise InvalidRequest("two of 'tools' have one name", param="tools")
    for name in _named_by(choice):
        if name not in names:
            raise InvalidRequest(f"'tool_choice' names {name!r}, which no tool is", param="tool_choice")
    for i, tool in enumerate(tools):
        check_schema(tool.function.parameters, f"tools[{i}].function.parameters", settings)
    if isinstance(choice, AllowedToolsChoice):  # what the model is not told of it does not call
        return [tool for tool in tools if tool.function.name in _named_by(choice)]
    return [] if choice == "none" else tools


def _named_by(choice: ToolChoice | None) -> list[str]:
    if isinstance(choice, NamedToolChoice):
        return [choice.function.name]
    return (
        [named.function.name for named in choice.allowed_tools.tools] if isinstance(choice, AllowedToolsChoice) else []
    )


def call_rules(body: ChatBody, tools: list[Tool], syntax: ModelSyntax, tokenizer: Tokenizer) -> CallRules | None:
    """What the calls must look like; None = there are no tools."""
    if not tools or syntax.tools is None:
        return None
    choice = body.tool_choice
    is_required = choice == "required" or isinstance(choice, NamedToolChoice)
    if isinstance(choice, AllowedToolsChoice):
        is_required = choice.allowed_tools.mode == "required"
    functions = [
        Function(tool.function.name, tool.function.parameters, bool(tool.function.strict))
        for tool in tools
        if not isinstance(choice, NamedToolChoice) or tool.function.name == choice.function.name
    ]
    return CallRules(
        family=syntax.tools,
        functions=functions,
        marks={mark: _spelled(mark, tokenizer) for mark in syntax.tools.marks},
        is_required=is_required,
        max_calls=1 if body.parallel_tool_calls is False or isinstance(choice, NamedToolChoice) else None,
        has_args_mark=syntax.has_args_mark and syntax.tools is ToolFamily.MISTRAL,
    )


def _spelled(mark: str, tokenizer: Tokenizer) -> str:
    """A mark in a grammar: a special token by its number, else as text."""
    token_id = tokenizer.special_id(mark)
    return f'"{mark}"' if token_id is None else f"<[{token_id}]>"
