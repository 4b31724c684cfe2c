"""`POST /v1/embeddings`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, Field

from services.gateway.schemas.body import INT32_MAX, Body, Refusal
from services.gateway.schemas.reply import JsonObject, Reply


class EmbeddingBody(Body):
    """Texts, token ids, or lists of either; vLLM's names where OpenAI has none."""

    refused: ClassVar[dict[str, Refusal]] = {
        "truncate_prompt_tokens": Refusal("inputs are never truncated in silence"),
        "truncation_side": Refusal("inputs are never truncated in silence"),
        "padding": Refusal("inputs are not padded", ("do_not_pad",)),
        "messages": Refusal("send the text that is to be embedded as 'input'"),
        "request_id": Refusal("replies of this endpoint have no id; see the header x-request-id"),
        "embed_dtype": Refusal("vectors are float32", ("float32",)),
        "endianness": Refusal("base64 is in little-endian order", ("native", "little")),
        "mm_processor_kwargs": Refusal("the model reads text only", ({},)),
    }

    model: str
    input: object = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1)
    add_special_tokens: bool | None = None
    normalize: bool | None = None
    use_activation: bool | None = None  # vLLM's newer name for `normalize`
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)
    priority: int | None = Field(default=None, ge=-(2**31), le=INT32_MAX)
    user: str | None = None


class EmbeddingUsage(BaseModel):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(Reply):
    """Vectors, in the order of the inputs: lists of numbers, or base64 of float32 in little-endian order."""

    object: Literal["list"] = "list"
    data: list[JsonObject]
    model: str
    usage: EmbeddingUsage
