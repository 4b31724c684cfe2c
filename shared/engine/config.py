"""What an engine is told at start."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from shared.engine.policy import FirstComeFirstServed, Policy
from shared.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits and policies of one engine.

    Attributes:
        block_size: Tokens per block; equal to the pool's.
        max_model_len: Prompt and output tokens of a sequence at most.
        eos_token_ids: Tokens that end a sequence unless its sampling says otherwise.
        max_batch_tokens: Tokens computed in one step at most.
        max_step_s: A step with prompt chunks takes about so long at most: bounds how long sequences that decode, and
            cancels, wait for it. 0 = no bound but `max_batch_tokens`.
        max_sequences: Sequences running at once at most; not above `max_batch_tokens`, so that every step has a token
            for each of them.
        max_waiting: Sequences that may wait (for KV or to run); beyond it submissions are refused as overloaded.
        max_skip_ahead: How many sequences that do not fit a step looks past for one that does.
        max_overtakes: A sequence overtaken so often by later ones lets nobody past any more.
        role: A prefill engine has no LM head, so it refuses sequences that sample.
        policy: Order in which sequences start.
    """

    block_size: int
    max_model_len: int
    eos_token_ids: frozenset[int] = frozenset()
    max_batch_tokens: int = 512
    max_step_s: float = 0.0
    max_sequences: int = 64
    max_waiting: int = 1024
    max_skip_ahead: int = 16
    max_overtakes: int = 64
    role: Literal["prefill", "decode"] = "decode"
    policy: Policy = field(default_factory=FirstComeFirstServed)

    def __post_init__(self) -> None:
        limits = ("block_size", "max_model_len", "max_batch_tokens", "max_sequences", "max_waiting", "max_overtakes")
        for name in limits:
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.max_sequences > self.max_batch_tokens:
            raise ConfigurationError(
                f"max_sequences {self.max_sequences} exceeds max_batch_tokens {self.max_batch_tokens}: "
                "a step could not give each running sequence its token"
            )
