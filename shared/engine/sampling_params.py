"""How the next token of a sequence is chosen. Imports no torch: the gateway validates with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.engine.thinking import Thinking

MAX_CHOICES = 128
"""Of one prompt."""
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One session's sampling instructions; immutable, shared by its choices.

    Attributes:
        temperature: 0 means greedy.
        top_p: Nucleus mass in (0, 1]; 1 is off.
        top_k: Keep the k likeliest tokens; 0 is off.
        min_p: Drop tokens below `min_p` times the likeliest one's probability; 0 is off.
        seed: Keys the counter-based noise together with choice index and position, so that any worker draws the same.
        presence_penalty: Subtracted once from every token already in the output.
        frequency_penalty: Subtracted per occurrence in the output.
        repetition_penalty: Divides (multiplies, if negative) logits of tokens seen in prompt or output; 1 is off.
        logit_bias: Added to the logits, by token id.
        max_tokens: Output tokens at most, >= 1.
        min_tokens: Until so many output tokens, end-of-sequence and stop tokens are masked.
        stop_token_ids: End the sequence, besides the model's own end-of-sequence tokens.
        ignore_eos: The model's end-of-sequence tokens do not end the sequence.
        num_logprobs: None for none; k for the sampled token's and the k likeliest tokens' log-probabilities, taken from
            the raw logits before any penalty, bias or temperature, as vLLM does.
        allowed_token_ids: Nothing else may be generated; None = everything may.
        bad_words: Token sequences that must not be completed in the output; each at least one token.
        grammar: What the output, but for its reasoning, must match, in llguidance's format; "" = free text.
        num_prompt_logprobs: None, or how many alternatives to each prompt token are wanted with its log-probability.
        beam_width: The choices are the best of so many beams; 0 = tokens are sampled. The engine knows no beams.
        length_penalty: Beams are compared by their log-probability divided by length to this power.
        thinking: How reasoning is told from the rest, where that matters to the engine: with a grammar or a budget.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    allowed_token_ids: frozenset[int] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str = ""
    thinking: Thinking | None = None
    num_prompt_logprobs: int | None = None
    beam_width: int = 0
    length_penalty: float = 1.0

    @property
    def is_guided(self) -> bool:
        """Which tokens may come depends on the output so far, or is limited throughout."""
        has_budget = self.thinking is not None and self.thinking.max_tokens is not None
        return self.allowed_token_ids is not None or bool(self.bad_words) or bool(self.grammar) or has_budget

    @property
    def is_greedy(self) -> bool:
        """The likeliest token, no noise."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Logits depend on what was generated before."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def edits_logits(self) -> bool:
        """Logits are changed before a token is chosen, always or at first."""
        return bool(self.logit_bias) or self.has_penalties or self.min_tokens > 0

    @property
    def depends_on_output(self) -> bool:
        """A token can be chosen only when the one before it is known, not merely being computed."""
        return self.has_penalties or self.is_guided
