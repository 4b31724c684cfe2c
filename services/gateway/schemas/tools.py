"""`tools` and `tool_choice` of a chat request."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from services.gateway.schemas.body import Body

UNSUPPORTED = "unsupported"
"""Type of validation errors that tell why a known value is not served."""
NO_CUSTOM_TOOLS = "custom tools, whose input is free text, are not built; a function's input is JSON"
_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"


def _not_custom(kind: object) -> object:
    if kind == "custom":
        raise PydanticCustomError(UNSUPPORTED, NO_CUSTOM_TOOLS)
    return kind


FunctionKind = Annotated[Literal["function"], BeforeValidator(_not_custom)]


class FunctionSchema(Body):
    """A function that the model may call; `parameters` is a JSON schema, absent = no arguments."""

    name: str = Field(pattern=_NAME)
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class Tool(Body):
    """One entry of `tools`."""

    type: FunctionKind
    function: FunctionSchema


class FunctionName(Body):
    """Names one of the tools."""

    name: str


class NamedToolChoice(Body):
    """The call must be of this function."""

    type: FunctionKind
    function: FunctionName


class AllowedTools(Body):
    """Some of the tools, of which one may or must be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedToolChoice] = Field(min_length=1)


class AllowedToolsChoice(Body):
    """The other tools are not to be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice
