"""`POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, Field

from services.gateway.schemas.body import INT32_MAX, Body, Refusal
from services.gateway.schemas.reply import Reply
from services.gateway.schemas.structure import JsonSchema


class Message(Body):
    """One turn: text, or a list of content blocks."""

    role: Literal["user", "assistant"]
    content: object


class OutputFormat(Body):
    """What the text must be: JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema = Field(alias="schema")


class OutputConfig(Body):
    """`output_config`."""

    refused: ClassVar[dict[str, Refusal]] = {"task_budget": Refusal("there are no budgets over several requests")}

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class PromptBody(Body):
    """What counting and creating have in common. `cache_control` is moot: every prompt's KV is cached by content."""

    refused: ClassVar[dict[str, Refusal]] = {
        "mcp_servers": Refusal("there are no MCP connections", ([],)),
        "context_management": Refusal("conversations are never edited"),
        "speed": Refusal("there is one speed", ("standard",)),
        "user_profile_id": Refusal("there are no user profiles"),
        "workspace_id": Refusal("there are no workspaces"),
        "kv_transfer_params": Refusal("KV moves between workers by itself"),
    }

    model: str
    messages: list[Message] = Field(min_length=1)
    system: object = None
    cache_control: dict[str, object] | None = None
    tools: list[dict[str, object]] | None = None
    tool_choice: dict[str, object] | None = None
    thinking: dict[str, object] | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # the older place of `output_config.format`
    chat_template_kwargs: dict[str, object] | None = None  # vLLM's


class CountTokensBody(PromptBody):
    """A prompt to be counted."""


class MessageMetadata(Body):
    """`metadata`."""

    user_id: str | None = None


class MessagesBody(PromptBody):
    """A prompt to be answered."""

    refused: ClassVar[dict[str, Refusal]] = PromptBody.refused | {
        "container": Refusal("there are no containers"),
        "service_tier": Refusal("there is one service tier", ("auto", "standard_only")),
        "inference_geo": Refusal("inference runs where Tandem runs"),
        "diagnostics": Refusal("there are no diagnostics"),
    }

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=INT32_MAX)
    metadata: MessageMetadata | None = None
    # Of /v1/chat/completions, where they are vLLM's.
    cache_salt: str | None = None
    priority: int | None = None


class MessageUsage(BaseModel):
    """`input_tokens` are those that had to be computed; reused ones are counted apart."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0


class MessageReply(Reply):
    """The assistant's turn. Streamed, it comes as the events `message_start` to `message_stop`."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[dict[str, object]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class CountReply(Reply):
    """Tokens of a prompt."""

    input_tokens: int


class MessageErrorDetail(BaseModel):
    """What went wrong."""

    type: str
    message: str


class MessageErrorReply(BaseModel):
    """Anthropic's error shape."""

    type: Literal["error"]
    error: MessageErrorDetail
