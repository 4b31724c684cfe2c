"""`POST /v1/completions`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from services.gateway.schemas.body import Refusal
from services.gateway.schemas.generation import GenerationBody
from shared.engine.sampling_params import MAX_CHOICES, MAX_LOGPROBS


class CompletionBody(GenerationBody):
    """Fields of a completion request. `prompt` is text, token ids, or a batch of either."""

    refused: ClassVar[dict[str, Refusal]] = GenerationBody.refused | {
        "prompt_embeds": Refusal("prompts are text or token ids"),
        "thinking_token_budget": Refusal("reasoning is told apart in chats only", (-1,)),
        "suffix": Refusal("the model does not fill in the middle", ("",)),
        "add_special_tokens": Refusal("text prompts get the special tokens that the tokenizer adds", (True,)),
    }

    prompt: object = None
    echo: bool | None = None
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    # 0 with `echo`: the prompt alone, for its log-probabilities.
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token, if log-probabilities were asked for at all."""
        return self.logprobs
