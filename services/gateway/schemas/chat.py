"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field

from services.gateway.schemas.body import INT32_MAX, Body, Refusal
from services.gateway.schemas.generation import GenerationBody
from services.gateway.schemas.tools import Tool, ToolChoice
from shared.engine.sampling_params import MAX_LOGPROBS

_TEXT_ONLY = "the model reads and writes text only"


class ToolCallFunction(Body):
    """What the assistant called; `arguments` is JSON in a string."""

    name: str
    arguments: str


class MessageToolCall(Body):
    """A call in an assistant's earlier turn."""

    model_config = ConfigDict(extra="ignore", json_schema_extra=None)  # replies tell more of a call, and are sent back

    id: str
    type: Literal["function"] = "function"
    function: ToolCallFunction


class ChatMessage(Body):
    """One turn. `content` is text, or a list of parts of type "text"."""

    refused: ClassVar[dict[str, Refusal]] = {
        "function_call": Refusal("it was replaced by tool_calls"),
        "audio": Refusal(_TEXT_ONLY),
        "refusal": Refusal("send what the assistant said as content"),
        # What OpenAI's client returns with a reply, and users send back unchanged.
        "annotations": Refusal("the chat template has no place for it", ([],)),
    }

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: object = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # vLLM's newer name of it


class ChatBody(GenerationBody):
    """Fields of a chat request."""

    refused: ClassVar[dict[str, Refusal]] = GenerationBody.refused | {
        "functions": Refusal("it was replaced by tools", ([],)),
        "function_call": Refusal("it was replaced by tool_choice", ("none", "auto")),
        "audio": Refusal(_TEXT_ONLY),
        "modalities": Refusal(_TEXT_ONLY, (["text"],)),
        "media_io_kwargs": Refusal(_TEXT_ONLY, ({},)),
        "mm_processor_kwargs": Refusal(_TEXT_ONLY, ({},)),
        "prediction": Refusal("predicted outputs are not built"),
        "verbosity": Refusal("the model has no verbosity to set", ("medium",)),
        "web_search_options": Refusal("there is no web search"),
        "store": Refusal("replies of this endpoint are not stored", (False,)),
        "metadata": Refusal("it labels stored replies, and replies of this endpoint are not stored", ({},)),
        "service_tier": Refusal("there is one service tier; see priority", ("auto", "default")),
        "moderation": Refusal("there is no moderation"),
        "prompt_cache_retention": Refusal("cached prompts stay as long as there is room", ("in_memory", "in-memory")),
        "prompt_cache_options": Refusal("cached prompts stay as long as there is room", ({},)),
        "echo": Refusal("chat replies hold the new turn only", (False,)),
        "best_of": Refusal("it belongs to /v1/completions; use n", (1,)),
        "add_special_tokens": Refusal("the chat template says which special tokens there are", (False,)),
        "chat_template": Refusal("templates are code: only the operator sets one, TANDEM_GATEWAY_CHAT_TEMPLATE"),
        "return_prompt_text": Refusal("see /tokenize", (False,)),
    }

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    # Names for abuse reports and cache routing. Placement goes by the cached content itself.
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: int | None = Field(default=None, ge=0, le=INT32_MAX)
    chat_template_kwargs: dict[str, object] | None = None
    documents: list[dict[str, str]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def max_output_tokens(self) -> int | None:
        """`max_completion_tokens`, or `max_tokens`, its older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token, if log-probabilities were asked for at all."""
        return (self.top_logprobs or 0) if self.logprobs else None
