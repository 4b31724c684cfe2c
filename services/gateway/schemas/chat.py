"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.gateway.schemas.body import GenerationBody, Refusal
from shared.engine.sampling_params import MAX_LOGPROBS

_NO_TOOLS = "tool calling is not built"
_TEXT_ONLY = "the model reads and writes text only"


class ChatMessage(BaseModel):
    """One turn. `content` is text, or a list of parts of type "text"."""

    model_config = ConfigDict(strict=True, extra="allow")

    refused: ClassVar[dict[str, Refusal]] = {
        "tool_calls": Refusal(_NO_TOOLS, ([],)),
        "tool_call_id": Refusal(_NO_TOOLS),
        "function_call": Refusal(_NO_TOOLS),
        "audio": Refusal(_TEXT_ONLY),
        "refusal": Refusal("send what the assistant said as content"),
        "reasoning_content": Refusal("reasoning is not told apart from content"),
        # What OpenAI's client returns with a reply, and users send back unchanged.
        "annotations": Refusal("the chat template has no place for it", ([],)),
    }

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: object = None
    name: str | None = None


class ChatBody(GenerationBody):
    """Fields of a chat request."""

    refused: ClassVar[dict[str, Refusal]] = GenerationBody.refused | {
        "tools": Refusal(_NO_TOOLS, ([],)),
        "tool_choice": Refusal(_NO_TOOLS, ("none", "auto")),
        "parallel_tool_calls": Refusal(_NO_TOOLS, (True, False)),
        "functions": Refusal(_NO_TOOLS, ([],)),
        "function_call": Refusal(_NO_TOOLS, ("none", "auto")),
        "audio": Refusal(_TEXT_ONLY),
        "modalities": Refusal(_TEXT_ONLY, (["text"],)),
        "prediction": Refusal("predicted outputs are not built"),
        "reasoning_effort": Refusal("the model has no reasoning effort to set", ("none",)),
        "verbosity": Refusal("the model has no verbosity to set", ("medium",)),
        "web_search_options": Refusal("there is no web search"),
        "store": Refusal("replies are not stored", (False,)),
        "metadata": Refusal("it labels stored replies, and replies are not stored", ({},)),
        "service_tier": Refusal("there is one service tier", ("auto", "default")),
        "moderation": Refusal("there is no moderation"),
        "prompt_cache_retention": Refusal("cached prompts stay as long as there is room", ("in_memory", "in-memory")),
        "echo": Refusal("chat replies hold the new turn only", (False,)),
        "add_generation_prompt": Refusal("the assistant's turn always follows", (True,)),
        "continue_final_message": Refusal("the assistant's turn is always a new one", (False,)),
        "add_special_tokens": Refusal("the chat template says which special tokens there are", (False,)),
        "chat_template": Refusal("the checkpoint's own template is used"),
        "chat_template_kwargs": Refusal("the checkpoint's template gets messages only", ({},)),
        "documents": Refusal("the checkpoint's template gets messages only", ([],)),
    }

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    # Names for abuse reports and cache routing. Placement goes by the cached content itself.
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def max_output_tokens(self) -> int | None:
        """`max_completion_tokens`, or `max_tokens`, its older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token, if log-probabilities were asked for at all."""
        return (self.top_logprobs or 0) if self.logprobs else None
