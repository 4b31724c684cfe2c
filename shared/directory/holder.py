"""One holder's share of the block hints: its index, and what it has, published off the critical path.

beat(): claim an index, keep it          publish(): sealed, evicted -> pending
             |                                          |
             v                                          v
    new index or generation:  --> backlog --> run(): pipelines of a few hundred blocks
    everything held goes again
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Sequence

import structlog

from shared.directory.hints import HINT_TTL_S, MAX_HOLDERS, publish_commands
from shared.directory.records import NO_HOLDER_INDEX
from shared.directory.store import RedisStore, StoreDown
from shared.identity import BlockHash, Incarnation

_CLAIM_PREFIX = b"tandem:{holders}:"
_CLAIM_WINDOW = 64
_BATCH_BLOCKS = 256
_MAX_PENDING = 200_000
_LEAVE_S = 1.0
_REPUBLISH_S = HINT_TTL_S / 3

_RELEASE_SCRIPT = "if redis.call('GET',KEYS[1])==ARGV[1] then redis.call('DEL',KEYS[1]) end"

_log = structlog.get_logger(__name__)


class Holder:
    """Publishes the blocks of one incarnation; made by `Directory.claim_holder`.

    An index left by a crashed process stays reserved for as long as its hints may live, so that its successor does not
    inherit them. Should a stale bit turn up nevertheless, whoever is asked for a block that it doesn't have calls
    `publish([], [block_hash])`, and the bit is gone.
    """

    def __init__(self, store: RedisStore, incarnation: Incarnation, blocks: Callable[[], Iterable[BlockHash]]) -> None:
        """Claims nothing yet.

        Args:
            store: Shared with the rest of the directory.
            incarnation: Of the holding process.
            blocks: All that it holds now; asked when everything must be published again.
        """
        self._store = store
        self._incarnation = incarnation
        self._blocks = blocks
        self._index = NO_HOLDER_INDEX
        self._generation: bytes | None = None
        self._pending: dict[BlockHash, bool] = {}
        self._backlog: list[BlockHash] = []
        self._backlog_revoked: set[BlockHash] = set()
        self._overflowed = False
        self._republish_at = 0.0
        self._has_left = False
        self._wake = asyncio.Event()

    @property
    def index(self) -> int:
        """The bit of this holder, or `NO_HOLDER_INDEX`; may change when Redis lost its data."""
        return self._index

    @property
    def num_unpublished(self) -> int:
        """Blocks whose hints are not in Redis yet."""
        return len(self._pending) + len(self._backlog)

    def publish(self, sealed: Iterable[BlockHash], evicted: Iterable[BlockHash]) -> None:
        """Notes changes and returns at once; of several about one block the last counts."""
        if self._index == NO_HOLDER_INDEX:
            return  # all blocks are published when there is an index
        for block_hash in sealed:
            self._pending[block_hash] = True
            self._backlog_revoked.discard(block_hash)
        for block_hash in evicted:
            self._pending[block_hash] = False
            if self._backlog:
                self._backlog_revoked.add(block_hash)
        self._bound_pending()
        self._wake.set()

    async def beat(self, generation: bytes) -> None:
        """Claims the index or keeps it; publishes everything again when Redis forgot it, or from time to time.

        Raises:
            StoreDown: Redis does not answer.
        """
        if self._has_left:
            return
        is_new = self._index == NO_HOLDER_INDEX or not await self._renew()
        if is_new:
            await self._claim()
        flushed = generation != self._generation
        self._generation = generation
        if is_new or flushed or self._overflowed or time.monotonic() >= self._republish_at:
            self._republish()
        if self.num_unpublished:
            self._wake.set()

    async def run(self) -> None:
        """Publishes until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                while batch := self._next_batch():
                    await self._send(batch)
            except StoreDown:
                continue  # the next beat that gets through wakes this loop

    async def leave(self) -> None:
        """Revokes the hints and frees the index, for ever; best effort, and for at most a second or so.

        What is not revoked in time expires, and the index stays reserved until then.
        """
        self._has_left = True
        if self._index == NO_HOLDER_INDEX:
            return
        index, self._index = self._index, NO_HOLDER_INDEX
        held = list(self._blocks())
        deadline = time.monotonic() + _LEAVE_S
        try:
            while held and time.monotonic() < deadline:
                batch = [held.pop() for _ in range(min(_BATCH_BLOCKS, len(held)))]
                await self._store.run(publish_commands(index, [], batch))
            if not held:
                await self._store.run([("EVAL", _RELEASE_SCRIPT, 1, _claim_key(index), self._incarnation)])
        except StoreDown as exc:
            _log.info("holder_left_hints_behind", holder_index=index, error=str(exc))

    def _republish(self) -> None:
        self._pending.clear()
        self._backlog = list(self._blocks())
        self._backlog_revoked.clear()
        self._overflowed = False
        # Holders that started together need not repeat themselves together.
        self._republish_at = time.monotonic() + _REPUBLISH_S * random.uniform(0.8, 1.0)

    def _next_batch(self) -> list[tuple[BlockHash, bool]]:
        if self._index == NO_HOLDER_INDEX:
            return []
        batch: list[tuple[BlockHash, bool]] = []
        while self._pending and len(batch) < _BATCH_BLOCKS:
            block_hash = next(iter(self._pending))
            batch.append((block_hash, self._pending.pop(block_hash)))
        while self._backlog and len(batch) < _BATCH_BLOCKS:
            block_hash = self._backlog.pop()
            if block_hash not in self._backlog_revoked:
                batch.append((block_hash, True))
        return batch

    async def _send(self, batch: Sequence[tuple[BlockHash, bool]]) -> None:
        sealed = [block_hash for block_hash, is_held in batch if is_held]
        revoked = [block_hash for block_hash, is_held in batch if not is_held]
        try:
            await self._store.run(publish_commands(self._index, sealed, revoked))
        except StoreDown:
            for block_hash, is_held in batch:
                self._pending.setdefault(block_hash, is_held)
            self._bound_pending()
            raise

    def _bound_pending(self) -> None:
        if len(self._pending) > _MAX_PENDING:
            self._pending.clear()
            self._overflowed = True

    async def _renew(self) -> bool:
        key = _claim_key(self._index)
        owner, _ = await self._store.run([("GET", key), ("EXPIRE", key, HINT_TTL_S)])
        return bool(owner == self._incarnation.encode())

    async def _claim(self) -> None:
        previous, self._index = self._index, NO_HOLDER_INDEX
        if previous != NO_HOLDER_INDEX and await self._try_claim(previous):
            return
        for start in range(0, MAX_HOLDERS, _CLAIM_WINDOW):
            window = range(start, start + _CLAIM_WINDOW)
            owners = await self._store.get_many([_claim_key(index) for index in window])
            for index, owner in zip(window, owners, strict=True):
                if owner is None and await self._try_claim(index):
                    return
        _log.error("holder_indices_exhausted", max_holders=MAX_HOLDERS)

    async def _try_claim(self, index: int) -> bool:
        reply = await self._store.run([("SET", _claim_key(index), self._incarnation, "NX", "EX", HINT_TTL_S)])
        if not reply[0]:
            return False
        self._index = index
        _log.info("holder_index_claimed", holder_index=index)
        return True


def _claim_key(index: int) -> bytes:
    return _CLAIM_PREFIX + str(index).encode()
