"""What the client asked, whatever the endpoint: immutable."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from services.gateway.syntax.reply_parser import ReplySyntax
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
        prompts: Text, or token ids as `pack_tokens` packs them. Chat requests have one text: the rendered conversation.
        add_special_tokens: Let the tokenizer add its special tokens; a rendered conversation has them already.
        num_choices: Choices per prompt that are generated.
        num_returned: Of them, the best are returned; equal to `num_choices` but for `best_of`.
        max_tokens: As asked for; None = `default_max_tokens`, and where that is None all the room that is left.
        sampling: All but `max_tokens`, which is known only with the prompt's length: see `sampling_for`.
        stop: Stop strings.
        echo: The reply begins with the prompt.
        hides_output: The prompt alone was asked for; what the worker generates, one token, is dropped.
        syntax: How replies are told into answer, reasoning and tool calls; None = all is text.
        continuous_usage: Every chunk tells the usage so far.
        include_stop: The stop string that ended a choice is part of its text.
        skip_special_tokens: Special tokens do not show in the text.
        returns_token_ids: Replies tell the ids of prompt and output.
        names_tokens_by_id: Log-probabilities name tokens as "token_id:7".
        truncate_prompt_tokens: Keep so many tokens of a prompt; -1 = as many as the context has room for.
        truncates_left: It is the end that is kept.
        returns_logprobs: Log-probabilities are part of the reply, not only what the best outputs are chosen by.
        grammar_field: Which field `sampling.grammar` is from, for errors.
    """

    request_id: str
    endpoint: Endpoint
    created: int
    prompts: tuple[str | bytes, ...]
    add_special_tokens: bool
    num_choices: int
    max_tokens: int | None
    default_max_tokens: int | None
    sampling: SamplingParams
    num_returned: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    timing: bool = False
    echo: bool = False
    hides_output: bool = False
    syntax: ReplySyntax | None = None
    continuous_usage: bool = False
    include_stop: bool = False
    skip_special_tokens: bool = True
    returns_token_ids: bool = False
    names_tokens_by_id: bool = False
    truncate_prompt_tokens: int | None = None
    truncates_left: bool = True
    returns_logprobs: bool = False
    grammar_field: str = ""
    cache_salt: str = ""
    priority: int = 0

    @property
    def asked_output_tokens(self) -> int:
        """Tokens that it asks room for, all choices together; 0 = it sets no limit."""
        limit = self.default_max_tokens if self.max_tokens is None else self.max_tokens
        return (limit or 0) * self.num_choices * len(self.prompts)

    def sampling_for(self, max_tokens: int) -> SamplingParams:
        """The sampling instructions of one prompt."""
        if max_tokens == self.sampling.max_tokens:
            return self.sampling
        return replace(self.sampling, max_tokens=max_tokens)
