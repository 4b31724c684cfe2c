"""Refuses, before it is queued, a sequence that could never run, and says both numbers."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from shared.engine.config import EngineConfig
from shared.engine.sampling_limits import check_sampling
from shared.engine.sequence import Sequence
from shared.errors import CapacityExceeded, ContextLengthExceeded, InvalidRequest


def check_admissible(sequence: Sequence, config: EngineConfig, num_blocks: int) -> None:
    """Passes if the sequence, alone in the worker, could run to its `max_tokens`.

    Args:
        sequence: As submitted.
        config: The engine's limits.
        num_blocks: Blocks of the pool in all.

    Raises:
        InvalidRequest: No tokens; sampling parameters that no step could use; or it samples on a prefill engine; or it
            is prefill-only and ends inside a block.
        ContextLengthExceeded: Longer than `max_model_len`.
        CapacityExceeded: Needs more blocks than the pool has.
    """
    _check_kind(sequence, config)
    prompt, limit = sequence.num_prompt_tokens, config.max_model_len
    if sequence.sampling is None:
        longest = prompt
        num_cached = prompt
    else:
        longest = prompt + sequence.sampling.max_tokens
        num_cached = longest - 1  # the last token is sampled, and nothing attends to it
    if prompt > limit:
        raise ContextLengthExceeded(f"the prompt has {prompt} tokens, the context length is {limit}")
    if longest > limit:
        raise ContextLengthExceeded(
            f"a prompt of {prompt} tokens and max_tokens {longest - prompt} make {longest}, "
            f"the context length is {limit}",
            param="max_tokens",
        )
    needed = -(-num_cached // config.block_size)
    if needed > num_blocks:
        raise CapacityExceeded(
            f"{num_cached} tokens need {needed} KV blocks of {config.block_size} tokens, the worker has {num_blocks}"
        )


def check_token_ids(token_ids: Seq[int], vocab_size: int) -> None:
    """Passes a prompt that a model of this vocabulary can read; kernels look ids up unchecked.

    Raises:
        InvalidRequest: No tokens, or one outside the vocabulary.
    """
    if not token_ids:
        raise InvalidRequest("the prompt has no tokens", param="prompt")
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise InvalidRequest(f"token id {bad} is outside the vocabulary [0, {vocab_size})", param="prompt")


def _check_kind(sequence: Sequence, config: EngineConfig) -> None:
    if not sequence.token_ids:
        raise InvalidRequest("the prompt has no tokens")
    if sequence.sampling is not None:
        if config.role == "prefill":
            raise InvalidRequest("a prefill worker samples no tokens")
        check_sampling(sequence.sampling)
    elif sequence.pooling is None and sequence.num_prompt_tokens % config.block_size:
        raise InvalidRequest(
            f"a prefill-only sequence ends at a block border: {sequence.num_prompt_tokens} tokens is no multiple of "
            f"{config.block_size}"
        )
