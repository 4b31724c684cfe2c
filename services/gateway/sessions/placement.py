"""Where a prompt is prefilled and decoded: a pure function of a snapshot.

What a placement costs is counted in seconds, summed over everybody who waits:

    local    (queue + uncached tokens) / decode rate, and the compute once more for each sequence already decoding
             there, as this gateway knows now, because chunks of this prompt are computed between their tokens
    remote   (queue + uncached tokens) / prefill rate overlapped with the transfer of the blocks, then the tail here;
             and for each sequence decoding here what it loses while that neighbour computes: nothing on a machine of
             its own, about as much as beside a local prefill on cores that both share
    both     the transfer of cached blocks that another worker holds, and a nominal cost for each sequence that
             shares the decode worker's steps

That nominal cost ranks decode workers and is no part of the prediction. Rates, and what a neighbour costs, are the
workers' own measurements; until a worker has one, a nominal rate stands in. Either way is dearer by what first tokens
of that mode lately took beyond this model (`placement_learning`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from shared.directory.records import TransferRecord, WorkerRecord
from shared.identity import Fingerprint, WorkerId

NOMINAL_PREFILL_TOKENS_PER_S = 2_000.0
NOMINAL_TRANSFER_BYTES_PER_S = 1e9
STEP_SHARE_S = 0.02  # what one more sequence in the batch costs the newcomer, nominally; spreads load when all is equal
CROWDED_S = 1.0  # the prompt's blocks are not free now: it would wait for others to end
MAX_PREFILL_CANDIDATES = 3
MAX_HOLDERS = 4

Policy = Literal["auto", "remote", "local"]


class Mode(Enum):
    """How a prompt's KV is expected to come to the decode worker. The worker reports what really happened."""

    LOCAL = "local"
    FETCHED = "fetched"
    REMOTE_PREFILL = "remote_prefill"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What placement knows of a prompt.

    Attributes:
        prefixes: Per fingerprint and holder index, how many of the prompt's leading blocks that holder probably has.
    """

    num_tokens: int
    prefixes: Mapping[Fingerprint, Mapping[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The cluster as this gateway sees it.

    Attributes:
        decode_workers: Those that can be submitted to now.
        prefill_workers: As the directory has them.
        transfers: Every kv_transfer; also those whose worker is gone.
        open_sessions: Per decode worker, sessions of this gateway that its last heartbeat may not show yet.
        sent_prefill_tokens: Likewise per worker that computes prompts, of either role: tokens sent there whose first
            token has not come.
        overhead_s: Per mode, what first tokens took beyond the model.
    """

    decode_workers: Sequence[WorkerRecord]
    prefill_workers: Sequence[WorkerRecord] = ()
    transfers: Sequence[TransferRecord] = ()
    open_sessions: Mapping[WorkerId, int] = field(default_factory=dict)
    sent_prefill_tokens: Mapping[WorkerId, int] = field(default_factory=dict)
    overhead_s: Mapping[Mode, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Holder:
    """A kv_transfer that probably has the first `num_blocks` blocks of the prompt."""

    record: TransferRecord
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Placement:
    """The decision.

    Attributes:
        prefill_candidates: In order of preference; empty = the decode worker computes what nobody has.
        holders: Longest prefix first; the decode worker's own kv_transfer may be among them.
        uncached_tokens: Prompt tokens in whole blocks that nobody is known to have.
        predicted_s: Expected seconds to the first token.
        overhead_s: Share of it that is experience, not model.
        local_s, remote_s: Summed cost of either way on this decode worker; `remote_s` is None without prefill workers.
        is_measured: The rates behind the numbers are measured, not nominal.
    """

    decode: WorkerRecord
    prefill_candidates: tuple[WorkerRecord, ...]
    holders: tuple[Holder, ...]
    mode: Mode
    uncached_tokens: int
    predicted_s: float
    local_s: float
    remote_s: float | None
    is_measured: bool
    overhead_s: float = 0.0

    @property
    def computes(self) -> WorkerRecord:
        """The worker that is to compute what nobody has."""
        return self.prefill_candidates[0] if self.prefill_candidates else self.decode


def place(
    prompt: Prompt, snapshot: Snapshot, policy: Policy = "remote", min_remote_tokens: int = 0
) -> Placement | None:
    """Chooses the decode worker, and the way to its KV, that cost least.

    Args:
        prompt: What is to be prefilled.
        snapshot: Where it could be.
        policy: See `GatewaySettings.placement`.
        min_remote_tokens: With fewer uncached tokens than this, the decode worker prefills.

    Returns:
        None when there is no decode worker.
    """
    options = [
        _Option(prompt, snapshot, worker).placement(policy, min_remote_tokens)
        for worker in latest_lives(snapshot.decode_workers)
        if can_take_work(worker)
    ]
    return min(options, key=_total_cost, default=None)


def holders_of(prompt: Prompt, snapshot: Snapshot, decode: WorkerRecord) -> tuple[Holder, ...]:
    """Who has how much of a prompt that `decode` will generate from; longest first."""
    return _Option(prompt, snapshot, decode).holders


def can_take_work(worker: WorkerRecord) -> bool:
    """Whether a worker may get new sessions."""
    return worker.ready and not worker.draining


def latest_lives(workers: Iterable[WorkerRecord]) -> list[WorkerRecord]:
    """Of several incarnations of one worker only the youngest: the others are dead and not expired yet."""
    latest: dict[WorkerId, WorkerRecord] = {}
    for worker in workers:
        other = latest.get(worker.worker_id)
        if other is None or worker.started_at > other.started_at:
            latest[worker.worker_id] = worker
    return list(latest.values())


def _total_cost(placement: Placement) -> tuple[float, str]:
    remote = placement.mode is Mode.REMOTE_PREFILL and placement.remote_s is not None
    cost = placement.remote_s if remote else placement.local_s
    assert cost is not None
    return cost, placement.decode.worker_id


class _Option:
    """One decode worker under consideration. Lives for one call of `place`."""

    def __init__(self, prompt: Prompt, snapshot: Snapshot, decode: WorkerRecord) -> None:
        self._prompt = prompt
        self._snapshot = snapshot
        self._decode = decode
        # The last prompt token is always computed by the decode worker: its logits give the first token.
        self._usable_blocks = max(0, prompt.num_tokens - 1) // decode.block_size
        self._holders = self._find_holders()
        self._own_blocks = max(
            (h.num_blocks for h in self._holders if h.record.worker_id == decode.worker_id), default=0
        )
        self._held_blocks = max((h.num_blocks for h in self._holders), default=0)

    @property
    def holders(self) -> tuple[Holder, ...]:
        """Those worth naming to the worker."""
        return tuple(self._holders[:MAX_HOLDERS])

    def placement(self, policy: Policy, min_remote_tokens: int) -> Placement:
        """The better way to prefill for this worker."""
        prefill = sorted(self._prefill_workers(), key=lambda w: (self._remote_wait_s(w), w.worker_id))
        mode = Mode.FETCHED if self._held_blocks > self._own_blocks else Mode.LOCAL
        overheads = self._snapshot.overhead_s
        local_s = self._local_s() + overheads.get(mode, 0.0)
        remote_s = self._remote_s(prefill[0]) + overheads.get(Mode.REMOTE_PREFILL, 0.0) if prefill else None
        uncached = (self._usable_blocks - self._held_blocks) * self._decode.block_size
        measured = self._is_measured(prefill[0] if prefill else None)
        is_remote = (
            policy != "local"
            and remote_s is not None
            and uncached > 0
            and uncached >= min_remote_tokens
            and (policy == "remote" or not measured or remote_s <= local_s)
        )
        if is_remote:
            mode, wait_s = Mode.REMOTE_PREFILL, self._remote_wait_s(prefill[0]) + self._tail_s()
        else:
            wait_s = self._local_wait_s()
        return Placement(
            decode=self._decode,
            prefill_candidates=tuple(prefill[:MAX_PREFILL_CANDIDATES]) if is_remote else (),
            holders=self.holders,
            mode=mode,
            uncached_tokens=uncached,
            predicted_s=wait_s + self._crowded_s + overheads.get(mode, 0.0),
            local_s=local_s,
            remote_s=remote_s,
            is_measured=measured,
            overhead_s=overheads.get(mode, 0.0),
        )

    def _find_holders(self) -> list[Holder]:
        """Who has how much of the prompt, longest first; the worker's own kv_transfer wins a tie."""
        decode, prefixes = self._decode, self._prompt.prefixes.get(self._decode.fingerprint, {})
        holders = [
            Holder(record, min(prefixes[record.holder_index], self._usable_blocks))
            for record in self._snapshot.transfers
            if record.fingerprint == decode.fingerprint and prefixes.get(record.holder_index, 0) > 0
        ]
        holders = [holder for holder in holders if holder.num_blocks]
        return sorted(
            holders, key=lambda h: (-h.num_blocks, h.record.worker_id != decode.worker_id, h.record.worker_id)
        )

    def _prefill_workers(self) -> list[WorkerRecord]:
        decode = self._decode
        return [
            worker
            for worker in latest_lives(self._snapshot.prefill_workers)
            if can_take_work(worker) and worker.fingerprint == decode.fingerprint and worker.model == decode.model
        ]

    def _local_s(self) -> float:
        return self._local_wait_s() + self._stall_s(self._local_compute_s()) + self._shared_s()

    def _remote_s(self, prefill: WorkerRecord) -> float:
        stalled_s = self._tail_s() + self._lost_s(prefill)
        return self._remote_wait_s(prefill) + self._tail_s() + self._stall_s(stalled_s) + self._shared_s()

    def _lost_s(self, prefill: WorkerRecord) -> float:
        """What a sequence that decodes here falls behind while the prompt is computed there."""
        tokens = (self._usable_blocks - self._held_blocks) * self._decode.block_size
        return tokens / _prefill_rate(prefill) * (1 - 1 / max(1.0, self._decode.load.neighbour_slowdown))

    def _local_wait_s(self) -> float:
        queue_s = self._queued_tokens(self._decode) / _prefill_rate(self._decode)
        return queue_s + self._transfer_s(self._held_blocks - self._own_blocks) + self._local_compute_s()

    def _local_compute_s(self) -> float:
        computed = self._prompt.num_tokens - self._held_blocks * self._decode.block_size
        return computed / _prefill_rate(self._decode)

    def _remote_wait_s(self, prefill: WorkerRecord) -> float:
        """Until the decode worker has every block, chunks travelling while later ones are computed."""
        cached = self._held_blocks  # the prefill worker fetches what others hold, as the decode worker would
        tokens = (self._usable_blocks - cached) * self._decode.block_size
        compute_s = (self._queued_tokens(prefill) + tokens) / _prefill_rate(prefill)
        return max(compute_s, self._transfer_s(self._usable_blocks - self._own_blocks))

    def _queued_tokens(self, worker: WorkerRecord) -> int:
        """Prompt tokens before ours: as the worker said last, or as this gateway has sent since."""
        return max(worker.load.queued_prefill_tokens, self._snapshot.sent_prefill_tokens.get(worker.worker_id, 0))

    def _tail_s(self) -> float:
        """What the decode worker itself computes after a remote prefill."""
        return (self._prompt.num_tokens - self._usable_blocks * self._decode.block_size) / _prefill_rate(self._decode)

    def _transfer_s(self, num_blocks: int) -> float:
        rate = self._decode.load.transfer_bytes_per_s or NOMINAL_TRANSFER_BYTES_PER_S
        return num_blocks * self._decode.block_bytes / rate

    def _stall_s(self, compute_s: float) -> float:
        """What computing here costs the sequences that decode here, together.

        The last heartbeat is too old to say how many they are: at some requests per second, half of them are new.
        """
        return max(self._decode.load.running, self._open_sessions) * compute_s

    @property
    def _open_sessions(self) -> int:
        return self._snapshot.open_sessions.get(self._decode.worker_id, 0)

    def _shared_s(self) -> float:
        load = self._decode.load
        sequences = max(load.running + load.waiting + load.waiting_for_kv, self._open_sessions)
        return sequences * STEP_SHARE_S + self._crowded_s

    @property
    def _crowded_s(self) -> float:
        load, needed = self._decode.load, self._usable_blocks + 1 - self._own_blocks
        is_crowded = load.total_blocks > 0 and needed > load.free_blocks + load.cached_blocks
        return CROWDED_S if is_crowded else 0.0

    def _is_measured(self, prefill: WorkerRecord | None) -> bool:
        load = self._decode.load
        rates = [load.prefill_tokens_per_s]
        if prefill is not None:
            rates += [prefill.load.prefill_tokens_per_s, load.transfer_bytes_per_s]
        return all(rate > 0 for rate in rates)


def _prefill_rate(worker: WorkerRecord) -> float:
    return worker.load.prefill_tokens_per_s or NOMINAL_PREFILL_TOKENS_PER_S
