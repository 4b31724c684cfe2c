"""`tools` and `tool_choice` of a chat request."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

_CLOSED = ConfigDict(strict=True, extra="forbid")
_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"


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

    type: Literal["function"]
    function: FunctionSchema


class FunctionName(BaseModel):
    """Names one of the tools."""

    model_config = _CLOSED

    name: str


class NamedToolChoice(BaseModel):
    """The call must be of this function."""

    model_config = _CLOSED

    type: Literal["function"]
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
