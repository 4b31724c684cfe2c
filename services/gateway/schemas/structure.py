"""`response_format` and `structured_outputs`: what the output must look like."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

_CLOSED = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

JsonSchema = dict[str, object] | bool


class NamedSchema(BaseModel):
    """`response_format.json_schema`. The schema is kept to whether or not `strict` is asked for."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=(), populate_by_name=True)

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    json_schema: JsonSchema = Field(alias="schema")
    strict: bool | None = None


class TextFormat(BaseModel):
    """Anything."""

    model_config = _CLOSED

    type: Literal["text"]


class JsonObjectFormat(BaseModel):
    """Any JSON object."""

    model_config = _CLOSED

    type: Literal["json_object"]


class JsonSchemaFormat(BaseModel):
    """JSON that a schema allows."""

    model_config = _CLOSED

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StructuredOutputs(BaseModel):
    """vLLM's `structured_outputs`; exactly one of the first five."""

    model_config = _CLOSED

    json_: JsonSchema | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(default=None, min_length=1)
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = Field(default=None, max_length=256)
