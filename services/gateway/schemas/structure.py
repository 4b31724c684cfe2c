"""`response_format` and `structured_outputs`: what the output must look like."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from services.gateway.schemas.body import Body

JsonSchema = dict[str, object] | bool


class NamedSchema(Body):
    """`response_format.json_schema`. The schema is kept to whether or not `strict` is asked for."""

    model_config = ConfigDict(populate_by_name=True)

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    json_schema: JsonSchema = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    """Anything."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`; exactly one of the first five."""

    json_: JsonSchema | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(default=None, min_length=1)
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = Field(default=None, max_length=256)
