"""`tools` and `tool_choice` of a chat request."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

_CLOSED = ConfigDict(strict=True, extra="forbid")
UNSUPPORTED = "unsupported"
"""Type of validation errors that tell why a known value is not served."""
NO_CUSTOM_TOOLS = "custom tools, whose input is free text, are not built; a function's input is JSON"
_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"


def _not_custom(kind: object) -> object:
    if kind == "custom":
        raise PydanticCustomError(UNSUPPORTED, NO_CUSTOM_TOOLS)
    return kind


FunctionKind = Annotated[Literal["function"], BeforeValidator(_not_custom)]


class FunctionSchema(BaseModel):
    """A function that the model may call; `parameters` is a JSON schema, absent = no arguments."""

    model_config = _CLOSED

    name: str = Field(pattern=_NAME)
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """One entry of `tools`."""

    model_config = _CLOSED

    type: FunctionKind
    function: FunctionSchema


class FunctionName(BaseModel):
    """Names one of the tools."""

    model_config = _CLOSED

    name: str


class NamedToolChoice(BaseModel):
    """The call must be of this function."""

    model_config = _CLOSED

    type: FunctionKind
    function: FunctionName


class AllowedTools(BaseModel):
    """Some of the tools, of which one may or must be called."""

    model_config = _CLOSED

    mode: Literal["auto", "required"]
    tools: list[NamedToolChoice] = Field(min_length=1)


class AllowedToolsChoice(BaseModel):
    """The other tools are not to be called."""

    model_config = _CLOSED

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice
