"""`/v1/responses`: bodies and replies."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.gateway.schemas.body import Body, Refusal
from services.gateway.schemas.reply import JsonObject, Reply
from services.gateway.schemas.structure import StructuredOutputs
from shared.engine.sampling_params import MAX_LOGPROBS

LOGPROBS = "message.output_text.logprobs"


class TextOptions(Body):
    """`text`."""

    refused: ClassVar[dict[str, Refusal]] = {
        "verbosity": Refusal("the model has no verbosity to set", ("medium",)),
    }

    format: dict[str, object] | None = None


class ResponseStreamOptions(Body):
    """`stream_options`. Nothing is ever padded, so there is no obfuscation to leave out."""

    refused: ClassVar[dict[str, Refusal]] = {"include_obfuscation": Refusal("events are never padded", (False,))}


class PromptBody(Body):
    """What counting and creating have in common."""

    refused: ClassVar[dict[str, Refusal]] = {
        "conversation": Refusal("there are no conversation objects; use 'previous_response_id'"),
        "truncation": Refusal("prompts are never truncated in silence", ("disabled",)),
    }

    model: str
    input: object = None
    instructions: str | None = None
    previous_response_id: str | None = Field(default=None, max_length=256)
    text: TextOptions | None = None
    tools: list[dict[str, object]] | None = None
    tool_choice: str | dict[str, object] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, object] | None = None


class ResponseBody(PromptBody):
    """A prompt to be answered."""

    refused: ClassVar[dict[str, Refusal]] = PromptBody.refused | {
        "max_tool_calls": Refusal("there are no hosted tools, which it limits"),
        "prompt": Refusal("there are no stored prompt templates"),
        "service_tier": Refusal("there is one service tier", ("auto", "default")),
        "context_management": Refusal("conversations are never compacted"),
        "moderation": Refusal("there is no moderation"),
        "image": Refusal("the model writes text only"),
        "access_programs": Refusal("there are no access programs"),
        "background_options": Refusal("there are no background options"),
        "prompt_cache_options": Refusal("every prompt's KV is cached by content"),
        "prompt_cache_retention": Refusal("cached prompts stay as long as there is room", ("in_memory", "in-memory")),
        "request_id": Refusal("responses are kept under ids that the server gives"),
        "previous_response": Refusal("send its items as 'input', or 'previous_response_id'"),
        "previous_input_messages": Refusal("send the items as 'input', or 'previous_response_id'"),
        "enable_response_messages": Refusal("see /tokenize for the prompt that a conversation makes", (False,)),
        "mm_processor_kwargs": Refusal("the model reads and writes text only", ({},)),
        "vllm_xargs": Refusal("there are no extensions that would read it", ({},)),
    }

    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    background: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # vLLM's names for what OpenAI's API does not have; their bounds are those of a chat's fields.
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: str | None = None
    priority: int | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Log-probabilities were asked for, by either of the two fields."""
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())


class ResponseReply(BaseModel):
    """A response. Streamed, it comes as the events `response.created` to `response.completed`."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: float
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    model: str
    output: list[JsonObject]


class InputItemList(Reply):
    """What a response was asked."""

    object: Literal["list"] = "list"
    data: list[JsonObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedReply(BaseModel):
    """It is gone."""

    id: str
    object: str
    deleted: bool


class InputTokensReply(Reply):
    """Tokens of a prompt."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int
