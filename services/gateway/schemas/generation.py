"""What the generation endpoints have in common: the fields that are honoured, and those that are refused by name."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from services.gateway.schemas.body import INT32_MAX, Body, Refusal
from services.gateway.schemas.structure import JsonSchema, ResponseFormat, StructuredOutputs
from shared.engine.sampling_params import MAX_CHOICES, MAX_LOGPROBS


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class GenerationBody(Body):
    """Fields of both `/v1/chat/completions` and `/v1/completions`; vLLM's names where OpenAI has none."""

    refused: ClassVar[dict[str, Refusal]] = {
        "guided_decoding_backend": Refusal("there is one library for constrained output", ("auto", "guidance")),
        "structural_tag": Refusal("use tools, or structured_outputs with a grammar"),
        "spaces_between_special_tokens": Refusal("text is what its tokens spell", (True, False)),
        "logprob_token_ids": Refusal("log-probabilities are those of the likeliest tokens"),
        "logits_processors": Refusal("requests bring no code"),
        "repetition_detection": Refusal("use repetition_penalty, or stop"),
        "watermarking": Refusal("output is not watermarked", (False,)),
        "vllm_xargs": Refusal("there are no extensions that would read it", ({},)),
        "kv_transfer_params": Refusal("KV moves between workers by itself"),
        "ec_transfer_params": Refusal("the model reads text only"),
        "session_id": Refusal("placement goes by the cached content itself"),
        "stream_interval": Refusal("tokens are streamed as they come", (1,)),
        "routed_experts_prompt_start": Refusal("replies do not tell which experts computed them", (0,)),
        "return_token_offsets": Refusal("it belongs to vLLM's render endpoints, which are not served", (False,)),
        "return_mm_kwargs": Refusal("it belongs to vLLM's render endpoints, which are not served", (True,)),
    }

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=INT32_MAX)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = Field(default=None, ge=0, le=INT32_MAX)
    ignore_eos: bool | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = Field(default=None, ge=-10, le=10)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    allowed_token_ids: list[int] | None = Field(default=None, min_length=1)
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, le=INT32_MAX)
    truncation_side: Literal["left", "right"] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = Field(default=None, discriminator="type")
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(default=None, min_length=1)
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = Field(default=None, max_length=256)
    request_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.:-]{1,128}$")
    user: str | None = None
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)
    priority: int | None = Field(default=None, ge=-(2**31), le=INT32_MAX)
    timing: bool | None = None

    @property
    def max_output_tokens(self) -> int | None:
        """The output limit asked for, under whichever name."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """None for no log-probabilities, else how many alternatives per token."""
        return None
