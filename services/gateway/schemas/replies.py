"""What the endpoints of OpenAI's core API and the probes answer."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from services.gateway.schemas.reply import JsonObject, Reply


class ErrorDetail(BaseModel):
    """What went wrong; `code` is stable."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(BaseModel):
    """OpenAI's error shape."""

    error: ErrorDetail


class ModelCard(Reply):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tandem"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(Reply):
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class LiveReport(Reply):
    """The process turns."""

    status: Literal["ok"] = "ok"


class HealthReport(Reply):
    """`reason` says why it is not ready; empty when it is."""

    model_config = ConfigDict(extra="allow")

    status: str
    reason: str
    directory: str
    decode_workers: list[str]
    prefill_workers: list[str]


class VersionReport(Reply):
    """What runs."""

    version: str
    service: Literal["gateway"] = "gateway"
    model: str


class CachedTokens(BaseModel):
    """Of the prompt's tokens, those whose KV was reused."""

    cached_tokens: int


class UsageReply(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | None = None


class _Choice(BaseModel):
    index: int
    logprobs: JsonObject | None = None
    finish_reason: str | None
    stop_reason: str | int | None = None


class ChatReplyMessage(BaseModel):
    """The assistant's turn."""

    model_config = ConfigDict(extra="allow")

    role: Literal["assistant"]
    content: str | None


class ChatReplyChoice(_Choice):
    """One of `n`."""

    message: ChatReplyMessage


class ChatCompletionReply(BaseModel):
    """`chat.completion`. Streamed, it comes as `chat.completion.chunk` events and ends with `[DONE]`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatReplyChoice]
    usage: UsageReply
    timing: JsonObject | None = None


class TextReplyChoice(_Choice):
    """One of `n` for one of the prompts."""

    text: str


class TextCompletionReply(BaseModel):
    """`text_completion`, also in its streamed chunks."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextReplyChoice]
    usage: UsageReply
    timing: JsonObject | None = None
