"""Bodies and replies of the protocol over HTTP, as openapi.json tells them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from services.gateway.schemas.reply import JsonObject


class InferBody(BaseModel):
    """Tensors as lists, or with `binary_data_size` as bytes behind the JSON."""

    inputs: list[JsonObject]
    id: str = ""
    parameters: JsonObject = {}
    outputs: list[JsonObject] = []


class InferReply(BaseModel):
    """Output tensors."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_version: str
    id: str = ""
    outputs: list[JsonObject]


class GenerateBody(BaseModel):
    """A text and the fields of a completion."""

    model_config = ConfigDict(extra="allow")

    text_input: str
    parameters: JsonObject = {}


class GenerateReply(BaseModel):
    """A text, and what was flagged."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model_name: str
    model_version: str
    text_output: str


class KServeError(BaseModel):
    """The protocol's error shape."""

    error: str
