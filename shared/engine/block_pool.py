"""Who holds which KV block, and which sealed block has which name. Pure bookkeeping: it never touches KV bytes.

Every block is in exactly one state:

              allocate                 unref, sealed
      FREE -------------> USED ---------------------------> CACHED ---> evicted to FREE or USED
        ^                 |  | ^---------- ref ---------------' |
        |  unref, private |  |                                  | pin (by hash)
        |-----------------'  | quarantine                       v
        |                    v                               PINNED ---> unpin: CACHED; ref: USED
        '----------- QUARANTINED

    USED         referenced by at least one sequence (it may be pinned as well)
    PINNED       unreferenced, but an open call of a peer, a running save or a copy that a step makes reads it
    CACHED       sealed, neither referenced nor pinned: found by hash, evicted when room is needed
    QUARANTINED  a transport may still write it; nobody may use it

A private block becomes *sealed* when its name is known (`seal`); from then on it is immutable and in the index. Others
may `borrow` a block before: they read what was written until then, and `detach` themselves before they write.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from shared.engine.pins import Pins
from shared.errors import InternalError
from shared.identity import BlockHash, BlockId

MISSING = BlockId(-1)

RecordName = Callable[[BlockId, BlockHash | None], None]


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """How many blocks are in each state; the states add up to `total`."""

    total: int
    free: int
    cached: int
    used: int
    pinned: int
    quarantined: int


class BlockPool:
    """All blocks of one worker. Not thread-safe: the engine's lock guards it.

    Eviction takes cached blocks only: first those that were saved ahead (see `take_unsaved`), then the least recently
    used. Every operation is O(1) per block.

    Attributes:
        num_blocks: Blocks in the arena; ids are `[0, num_blocks)`.
        block_size: Tokens per block.
    """

    def __init__(self, num_blocks: int, block_size: int, record: RecordName | None = None) -> None:
        """Starts with all blocks free.

        Args:
            num_blocks: In the arena.
            block_size: Tokens.
            record: Told of every name at once: when a block gets it, and None before the block is given away.
        """
        self._record_name = record or _forget_name
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = [BlockId(i) for i in range(num_blocks - 1, -1, -1)]
        self._references = [0] * num_blocks
        self._pins = Pins(num_blocks)
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._index: dict[BlockHash, BlockId] = {}
        self._cached: OrderedDict[BlockId, None] = OrderedDict()  # least recently used first
        self._saved_ahead: OrderedDict[BlockId, None] = OrderedDict()  # cached too, evicted before the others
        self._saving: set[BlockId] = set()
        self._quarantined: set[BlockId] = set()
        self._num_used = 0
        self._sealed_events: dict[BlockHash, None] = {}
        self._evicted_events: dict[BlockHash, None] = {}

    # Counts

    @property
    def num_allocatable(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free) + len(self._cached) + len(self._saved_ahead)

    def counts(self) -> BlockCounts:
        """Blocks by state."""
        cached = len(self._cached) + len(self._saved_ahead)
        unpinned = len(self._free) + cached + self._num_used + len(self._quarantined)
        return BlockCounts(
            total=self.num_blocks,
            free=len(self._free),
            cached=cached,
            used=self._num_used,
            pinned=self.num_blocks - unpinned,
            quarantined=len(self._quarantined),
        )

    @property
    def oldest_pin_s(self) -> float:
        """For how long the block that is pinned longest has been; 0.0 if none is."""
        return self._pins.oldest_age_s

    def references(self, block: BlockId) -> int:
        """How many sequences hold the block."""
        return self._references[block]

    def is_idle(self, block: BlockId) -> bool:
        """Neither referenced nor pinned: taking a reference makes one block fewer allocatable."""
        return not self._references[block] and not self._pins.counts[block]

    def adopt(self, blocks: Sequence[tuple[BlockId, BlockHash]]) -> None:
        """Takes over sealed blocks of an earlier life, least valuable first; only before anything else happened.

        Names that come twice count once; the other block is free.
        """
        assert len(self._free) == self.num_blocks, "the pool is in use"
        for block, name in blocks:
            if name in self._index or self._hashes[block] is not None:
                continue
            self._index[name] = block
            self._hashes[block] = name
            self._cached[block] = None
            _record(name, self._sealed_events, undoes=self._evicted_events)
        self._free = [block for block in self._free if self._hashes[block] is None]

    # References of sequences

    def allocate(self, n: int) -> list[BlockId] | None:
        """Takes `n` private blocks, one reference each, evicting cached ones as needed; None if there is no room."""
        if n > self.num_allocatable:
            return None
        for _ in range(n - len(self._free)):
            self._evict_one()
        blocks = [self._free.pop() for _ in range(n)]
        for block in blocks:
            self._references[block] = 1
        self._num_used += n
        return blocks

    def ref(self, block: BlockId) -> None:
        """Adds a reference to a sealed block."""
        assert self._hashes[block] is not None, f"block {block} is private"
        if self.is_idle(block):
            self._leave_cache(block)
        if not self._references[block]:
            self._num_used += 1
        self._references[block] += 1

    def unref(self, block: BlockId) -> None:
        """Drops a reference; the last one frees a private block and leaves a sealed one to the cache."""
        assert self._references[block] > 0, f"block {block} is not referenced"
        self._references[block] -= 1
        if not self._references[block]:
            self._num_used -= 1
            if not self._pins.counts[block]:
                self._retire(block)

    # Copy on write

    def borrow(self, block: BlockId) -> None:
        """Adds a reference to a block in use, sealed or not, that its holder may read but not write."""
        assert self._references[block] > 0, f"block {block} is not referenced"
        self._references[block] += 1

    def detach(self, block: BlockId) -> BlockId | None:
        """Exchanges the reference to a borrowed block for one to a private block; None if there is no room.

        That is the same block if nobody else has it any more. Else the borrowed one is pinned, because its bytes have
        yet to be copied to the new one: `unpin` it when they are.
        """
        if self._is_private(block):
            return block
        fresh = self.allocate(1)
        if fresh is None:
            return None
        self._pins.add(block)
        self.unref(block)
        return fresh[0]

    # Names

    def seal(self, block: BlockId, name: BlockHash) -> BlockId:
        """Names a private block whose KV is complete.

        If another block has that name already, the caller's reference moves there and the given block becomes free:
        equal names mean equal content, and a name has one block.

        Returns:
            The block that carries the name and the caller's reference.
        """
        assert self._references[block], f"block {block} is nobody's"
        assert self._hashes[block] is None, f"block {block} is sealed already"
        first = self._index.get(name)
        if first is not None:
            self.ref(first)
            self.unref(block)
            return first
        self._index[name] = block
        self._hashes[block] = name
        self._record_name(block, name)
        _record(name, self._sealed_events, undoes=self._evicted_events)
        return block

    def is_sealed(self, name: BlockHash) -> bool:
        """Some block carries the name."""
        return name in self._index

    def match_prefix(self, names: Sequence[BlockHash]) -> list[BlockId]:
        """Blocks of the longest known prefix of a hash chain; takes no references."""
        blocks: list[BlockId] = []
        for name in names:
            block = self._index.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def sealed_names(self) -> list[BlockHash]:
        """Every name in the index."""
        return list(self._index)

    def drain_events(self) -> tuple[list[BlockHash], list[BlockHash]]:
        """`(sealed, evicted)` since the last drain, as net changes: no name is in both."""
        sealed, evicted = list(self._sealed_events), list(self._evicted_events)
        self._sealed_events.clear()
        self._evicted_events.clear()
        return sealed, evicted

    @property
    def has_events(self) -> bool:
        """`drain_events` would return something."""
        return bool(self._sealed_events or self._evicted_events)

    # Pins of peers

    def pin(self, name: BlockHash) -> BlockId:
        """Keeps the named block until `unpin`; `MISSING` if there is none."""
        block = self._index.get(name)
        if block is None:
            return MISSING
        if self.is_idle(block):
            self._leave_cache(block)
        self._pins.add(block)
        return block

    def unpin(self, block: BlockId) -> None:
        """Undoes one `pin`."""
        self._pins.remove(block)
        if self.is_idle(block):
            self._retire(block)

    # Save-ahead

    def take_unsaved(self, limit: int, *, everything: bool = False) -> list[tuple[BlockHash, BlockId]]:
        """Pins up to `limit` of the least recently used blocks, to be copied elsewhere before they are evicted.

        Hands out blocks only while fewer than half of all are free, and no more than the oldest quarter of the cache:
        a copy is usually there when eviction comes, and eviction never waits for one. With `everything`, whatever is
        cached: the worker is about to end.
        """
        if everything:
            wanted = len(self._cached)
        elif 2 * len(self._free) >= self.num_blocks:
            return []
        else:
            ahead = len(self._saved_ahead) + len(self._saving)
            wanted = (len(self._cached) + ahead) // 4 - ahead
        taken: list[tuple[BlockHash, BlockId]] = []
        for _ in range(min(limit, wanted)):
            block, _ = self._cached.popitem(last=False)
            name = self._hashes[block]
            assert name is not None, f"cached block {block} has no name"
            self._pins.add(block)
            self._saving.add(block)
            taken.append((name, block))
        return taken

    def saved(self, block: BlockId, *, ok: bool) -> None:
        """Ends the copy of a block from `take_unsaved`. Unless used meanwhile, it is among the next to be evicted.

        A failed copy leaves it the least recently used block: offered again, or lost if room is needed first.
        """
        self._saving.remove(block)
        self._pins.remove(block)
        if not self.is_idle(block):
            return
        if ok:
            self._saved_ahead[block] = None
        else:
            self._cached[block] = None
            self._cached.move_to_end(block, last=False)

    # Quarantine

    def quarantine(self, block: BlockId) -> None:
        """Sets a private block aside, because a transport may still write it."""
        assert self._is_private(block), f"block {block} cannot be quarantined"
        self._references[block] = 0
        self._num_used -= 1
        self._quarantined.add(block)

    def release_quarantined(self, block: BlockId) -> None:
        """Frees a quarantined block: the transfer is proven over."""
        self._quarantined.remove(block)
        self._free.append(block)

    # Transitions

    def _is_private(self, block: BlockId) -> bool:
        return self._references[block] == 1 and self._hashes[block] is None

    def _retire(self, block: BlockId) -> None:
        if self._hashes[block] is None:
            self._free.append(block)
        else:
            self._cached[block] = None

    def _leave_cache(self, block: BlockId) -> None:
        if block in self._cached:
            del self._cached[block]
        else:
            del self._saved_ahead[block]

    def _evict_one(self) -> None:
        block, _ = (self._saved_ahead or self._cached).popitem(last=False)
        name = self._hashes[block]
        assert name is not None, f"cached block {block} has no name"
        del self._index[name]
        self._hashes[block] = None
        self._record_name(block, None)
        _record(name, self._evicted_events, undoes=self._sealed_events)
        self._free.append(block)

    # Self-check

    def check_integrity(self) -> None:
        """Verifies that every block is in exactly one state and that the index agrees; O(num_blocks).

        Raises:
            InternalError: It does not; names the first violation.
        """
        free, cached = set(self._free), set(self._cached) | set(self._saved_ahead)
        _require(len(free) == len(self._free), "a block is free twice")
        _require(len(cached) == len(self._cached) + len(self._saved_ahead), "a block is cached twice")
        used = {b for b in self._all_blocks() if self._references[b]}
        pinned = {b for b in self._all_blocks() if self._pins.counts[b] and not self._references[b]}
        states = (free, cached, used, pinned, self._quarantined)
        _require(
            sum(map(len, states)) == self.num_blocks, f"states hold {[len(s) for s in states]} of {self.num_blocks}"
        )
        _require(set().union(*states) == set(self._all_blocks()), "a block is in two states and another in none")
        _require(len(used) == self._num_used, f"{len(used)} blocks used, {self._num_used} counted")
        _require(min(self._references, default=0) >= 0 and min(self._pins.counts, default=0) >= 0, "a negative count")
        sealed = {b for b in self._all_blocks() if self._hashes[b] is not None}
        _require(
            {b: self._hashes[b] for b in sealed} == {b: h for h, b in self._index.items()}, "index and names differ"
        )
        _require(cached <= sealed, "a cached block has no name")
        _require(not sealed & (free | self._quarantined), "a free or quarantined block has a name")
        _require(all(self._pins.counts[b] for b in self._saving), "a block being saved is not pinned")
        _require(not self._sealed_events.keys() & self._evicted_events.keys(), "a name is both sealed and evicted")

    def _all_blocks(self) -> Iterable[BlockId]:
        return map(BlockId, range(self.num_blocks))


def _forget_name(block: BlockId, name: BlockHash | None) -> None:
    """Nobody wants to know."""


def _record(name: BlockHash, events: dict[BlockHash, None], *, undoes: dict[BlockHash, None]) -> None:
    if name in undoes:
        del undoes[name]
    else:
        events[name] = None


def _require(holds: bool, violation: str) -> None:
    if not holds:
        raise InternalError(f"block pool: {violation}")
