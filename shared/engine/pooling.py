"""Sequences that end in one vector instead of text: hidden states of their tokens, pooled.

A step computes some of the tokens; their final hidden states are added up in float64, so that the mean does not depend
on how the prompt was cut into chunks. What was added stays when the sequence is preempted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from shared.engine.sequence import Pooling
from shared.engine.step import PooledTokens, ScheduledSequence, StepBatch


def pool_step(
    hidden: torch.Tensor, batch: StepBatch, normalized: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[PooledTokens]:
    """What a step adds to the pools of its sequences.

    Args:
        hidden: `[T, hidden]` of the step, before the final norm.
        batch: The step.
        normalized: The final norm: `[R, hidden]` -> float32 `[R, hidden]`.
    """
    first = 0
    for item in batch.scheduled:
        last = first + item.num_new_tokens
        start = _first_token(item)
        if start < item.end:
            rows = normalized(hidden[last - (item.end - start) : last])
            total: npt.NDArray[np.float64] = rows.to(torch.float64).sum(0).cpu().numpy()
            yield PooledTokens(item.sequence, start, item.end, total)
        first = last


def _first_token(item: ScheduledSequence) -> int:
    """The first token of the step's that counts; its end if none does."""
    pooling, sequence = item.sequence.pooling, item.sequence
    if pooling is Pooling.MEAN:
        return max(item.num_computed, sequence.num_pooled_tokens)
    return sequence.num_tokens - 1 if pooling is Pooling.LAST and item.end == sequence.num_tokens else item.end
