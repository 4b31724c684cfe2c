"""Copies whole blocks inside the paged cache."""

from __future__ import annotations

import torch


def copy_blocks(arena: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor) -> None:
    """Copies block `sources[i]` to block `destinations[i]`, bit by bit, all layers of it.

    Args:
        arena: `[num_blocks, ...]` contiguous, any dtype; mutated. The bytes of a block are a multiple of 8.
        sources: int64 `[n]`, on the arena's device; may repeat.
        destinations: int64 `[n]`, likewise, but distinct and none of them a source.
    """
    for source, destination in zip(sources.tolist(), destinations.tolist(), strict=True):
        arena[destination] = arena[source]
