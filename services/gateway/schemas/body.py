"""What the generation endpoints have in common: the fields that are honoured, and those that are refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field that clients know and Tandem does not serve.

    Attributes:
        reason: Completes "'field' is not supported: ...".
        neutral: Values that ask for nothing and are therefore accepted, besides null.
    """

    reason: str
    neutral: tuple[object, ...] = ()


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None


class Body(BaseModel):
    """A JSON object that a client sends. What no field claims is kept, so that it can be refused with its reason."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    refused: ClassVar[dict[str, Refusal]] = {}


class GenerationBody(Body):
    """Fields of both `/v1/chat/completions` and `/v1/completions`; vLLM's names where OpenAI has none."""

    refused: ClassVar[dict[str, Refusal]] = {
        "use_beam_search": Refusal("beam search is not built", (False,)),
        "length_penalty": Refusal("it belongs to beam search, which is not built", (1.0,)),
        "prompt_logprobs": Refusal("log-probabilities of the prompt are not built"),
        "structured_outputs": Refusal("constrained output is not built"),
        "guided_json": Refusal("constrained output is not built"),
        "guided_regex": Refusal("constrained output is not built"),
        "guided_choice": Refusal("constrained output is not built"),
        "guided_grammar": Refusal("constrained output is not built"),
        "response_format": Refusal('constrained output is not built; only {"type": "text"} is', ({"type": "text"},)),
        "bad_words": Refusal("banning words is not built; use logit_bias", ([],)),
        "allowed_token_ids": Refusal("token allow-lists are not built; use logit_bias"),
        "include_stop_str_in_output": Refusal("stop strings are always left out", (False,)),
        "skip_special_tokens": Refusal("special tokens never appear in output text", (True,)),
        "spaces_between_special_tokens": Refusal("special tokens never appear in output text", (True, False)),
        "truncate_prompt_tokens": Refusal("prompts are never truncated in silence"),
        "return_tokens_as_token_ids": Refusal("tokens are returned as text and bytes", (False,)),
    }

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=None, ge=1)
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
