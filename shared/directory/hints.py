"""Block hints: which holders probably have a block.

Each live holder has a small integer, its index. The value under a block's key is a bitmap of indices, so that one MGET
over a prompt's hashes and a running AND give the longest prefix of every holder at once:

    hash of block    0        1        2        3
    bitmap           101      101      001      -          holder 0 has 2 blocks, holder 2 has 3

Redis numbers bits from the most significant bit of the first byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shared.directory.store import Command
from shared.identity import BlockHash

HINT_TTL_S = 3600
"""A hint that nobody repeats is forgotten after this long; holders repeat theirs three times as often."""

MAX_HOLDERS = 4096
"""Bound of the indices, hence of a bitmap: 512 bytes."""

_PREFIX = b"tkv:"

# The last holder's bit takes the key with it; a key that is gone stays gone. One key: legal on a cluster.
_CLEAR_SCRIPT = (
    "if redis.call('EXISTS',KEYS[1])==1 then redis.call('SETBIT',KEYS[1],ARGV[1],0) "
    "if redis.call('BITCOUNT',KEYS[1])==0 then redis.call('DEL',KEYS[1]) end end"
)


def hint_key(block_hash: BlockHash) -> bytes:
    """Redis key of a block's bitmap: 20 bytes."""
    return _PREFIX + block_hash


def publish_commands(index: int, sealed: Iterable[BlockHash], revoked: Iterable[BlockHash]) -> list[Command]:
    """Commands that set the holder's bit for sealed blocks and clear it for revoked ones."""
    commands: list[Command] = []
    for block_hash in sealed:
        key = hint_key(block_hash)
        commands.append(("SETBIT", key, index, 1))
        commands.append(("EXPIRE", key, HINT_TTL_S))
    commands.extend(("EVAL", _CLEAR_SCRIPT, 1, hint_key(block_hash), index) for block_hash in revoked)
    return commands


class PrefixCount:
    """Counts, block by block, how far each holder's unbroken prefix reaches."""

    def __init__(self) -> None:
        self._lengths: dict[int, int] = {}
        self._alive = -1  # holders that have every block so far; all, before the first
        self._num_blocks = 0

    @property
    def is_over(self) -> bool:
        """No holder has all blocks so far: later blocks cannot lengthen any prefix."""
        return self._alive == 0

    def extend(self, bitmaps: Sequence[bytes | None]) -> None:
        """Takes the bitmaps of the next blocks; None = no holder."""
        previous: bytes | None = None
        for bitmap in bitmaps:
            if self._alive == 0:
                return
            # Neighbouring blocks mostly have the same holders.
            if bitmap is None or bitmap != previous:
                remaining = self._alive & (0 if bitmap is None else int.from_bytes(bitmap, "little"))
                self._end(self._alive & ~remaining)
                self._alive = remaining
                previous = bitmap
            self._num_blocks += 1

    def finish(self) -> dict[int, int]:
        """Holder index to the number of blocks of its prefix; only holders that have the first block."""
        self._end(self._alive)
        self._alive = 0
        return self._lengths

    def _end(self, holders: int) -> None:
        if not self._num_blocks:
            return
        while holders:
            lowest = holders & -holders
            bit = lowest.bit_length() - 1
            self._lengths[bit & ~7 | 7 - (bit & 7)] = self._num_blocks
            holders ^= lowest
