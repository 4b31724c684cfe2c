"""What the client asked, whatever the endpoint: immutable."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from shared.engine.sampling_params import SamplingParams


class Endpoint(Enum):
    """Which API the request came through; decides the shape of the reply."""

    CHAT = "chat"
    COMPLETION = "completion"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request that passed validation, not tokenized yet.

    Attributes:
        request_id: Appears in the reply and in every log line.
        prompts: Text, or token ids. Chat requests have one text: the rendered conversation.
        add_special_tokens: Let the tokenizer add its special tokens; a rendered conversation has them already.
        num_choices: Choices per prompt.
        max_tokens: As asked for; None = `default_max_tokens`, and where that is None all the room that is left.
        sampling: All but `max_tokens`, which is known only with the prompt's length: see `sampling_for`.
        stop: Stop strings.
        echo: The reply begins with the prompt.
    """

    request_id: str
    endpoint: Endpoint
    created: int
    prompts: tuple[str | list[int], ...]
    add_special_tokens: bool
    num_choices: int
    max_tokens: int | None
    default_max_tokens: int | None
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    timing: bool = False
    echo: bool = False
    cache_salt: str = ""
    priority: int = 0

    def sampling_for(self, max_tokens: int) -> SamplingParams:
        """The sampling instructions of one prompt."""
        return replace(self.sampling, max_tokens=max_tokens)
