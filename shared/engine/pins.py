"""Which blocks are pinned, how often, and since when."""

from __future__ import annotations

import time
from collections.abc import Callable

from shared.identity import BlockId


class Pins:
    """Counts pins by block; guarded by whoever owns the blocks.

    Attributes:
        counts: Pins of each block.
    """

    def __init__(self, num_blocks: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.counts = [0] * num_blocks
        self._clock = clock
        self._since_s: dict[BlockId, float] = {}  # oldest first: a block enters with its first pin

    def add(self, block: BlockId) -> None:
        """One more."""
        if not self.counts[block]:
            self._since_s[block] = self._clock()
        self.counts[block] += 1

    def remove(self, block: BlockId) -> None:
        """One less; there must be one."""
        assert self.counts[block] > 0, f"block {block} is not pinned"
        self.counts[block] -= 1
        if not self.counts[block]:
            del self._since_s[block]

    @property
    def oldest_age_s(self) -> float:
        """For how long the block that is pinned longest has been; 0.0 if none is."""
        for since_s in self._since_s.values():
            return self._clock() - since_s
        return 0.0
