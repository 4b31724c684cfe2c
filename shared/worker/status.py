"""What an engine process says of itself: the Status call, the directory record's load, readiness."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Protocol

from protos import worker_pb2 as pb
from shared.directory.records import Role, WorkerLoad, WorkerRecord
from shared.engine.stats import EngineStats
from shared.identity import Fingerprint, Incarnation, WorkerId
from shared.worker.sidecar_link import SidecarLink

STALL_S = 10.0
"""Pending work and no step finished for so long: not ready, unless steps here are known to take long."""
_STALL_STEPS = 5.0  # a step may take this many times as long as the one before it


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """Who this process is, for one incarnation."""

    worker_id: WorkerId
    role: Role
    incarnation: Incarnation
    fingerprint: Fingerprint
    model: str
    dtype: str
    backend: str
    block_size: int
    max_model_len: int
    vocab_size: int
    block_bytes: int
    cpus: str = ""
    threads: int = 0


class Measured(Protocol):
    """What computes, as far as a status needs it: a decoder's engine, or an encoder's queue."""

    def stats(self) -> EngineStats:
        """A snapshot."""
        ...


class WorkerStatus:
    """Reads the engine and the link; holds only the draining flag.

    Args:
        link: None for a worker without KV, which has no kv_transfer beside it.
    """

    def __init__(self, identity: WorkerIdentity, engine: Measured, link: SidecarLink | None) -> None:
        self.identity = identity
        self.is_draining = False
        self._engine = engine
        self._link = link

    @property
    def is_hung(self) -> bool:
        """There is work, and no step ends."""
        return bool(_stall(self._engine.stats()))

    def readiness(self) -> tuple[bool, str]:
        """Whether new work is welcome, and if not, why. Busy is ready; hung is not."""
        return self._readiness(self._engine.stats())

    def _readiness(self, stats: EngineStats) -> tuple[bool, str]:
        if stats.failure:
            return False, f"the engine stopped: {stats.failure}"
        if self.is_draining:
            return False, "draining"
        link = self._link
        if link and not link.is_attached and (self.identity.role == "prefill" or link.incarnation is None):
            return False, "kv_transfer is not attached"
        if stall := _stall(stats):
            return False, stall
        quarantined, bound = stats.blocks.quarantined, stats.blocks.total // 4
        if quarantined > bound:
            return False, f"{quarantined} blocks quarantined (limit {bound})"
        return True, ""

    def _load(self, stats: EngineStats) -> WorkerLoad:
        return WorkerLoad(
            running=stats.running,
            waiting=stats.waiting,
            waiting_for_kv=stats.waiting_for_kv,
            free_blocks=stats.blocks.free,
            cached_blocks=stats.blocks.cached,
            used_blocks=stats.blocks.used,
            pinned_blocks=stats.blocks.pinned,
            quarantined_blocks=stats.blocks.quarantined,
            total_blocks=stats.blocks.total,
            queued_prefill_tokens=stats.queued_prefill_tokens,
            prefill_tokens_per_s=stats.prefill_tokens_per_s,
            transfer_bytes_per_s=self._link.bytes_per_s if self._link else 0.0,
            neighbour_slowdown=stats.neighbour_slowdown,
        )

    def record(self, address: str, started_at: float) -> WorkerRecord:
        """For the directory.

        Args:
            address: Where the worker serves gRPC.
            started_at: Unix seconds.
        """
        stats, who = self._engine.stats(), self.identity
        ready, _ = self._readiness(stats)
        return WorkerRecord(
            worker_id=who.worker_id,
            role=who.role,
            model=who.model,
            fingerprint=who.fingerprint,
            incarnation=who.incarnation,
            address=address,
            pid=os.getpid(),
            block_size=who.block_size,
            max_model_len=who.max_model_len,
            vocab_size=who.vocab_size,
            block_bytes=who.block_bytes,
            load=self._load(stats),
            draining=self.is_draining,
            ready=ready,
            hung=bool(_stall(stats)),
            started_at=started_at,
        )

    def reply(self) -> pb.StatusReply:
        """For the Status call."""
        stats, who = self._engine.stats(), self.identity
        ready, reason = self._readiness(stats)
        return pb.StatusReply(
            worker_id=who.worker_id,
            role=who.role,
            incarnation=who.incarnation,
            fingerprint=who.fingerprint,
            model=who.model,
            pid=os.getpid(),
            blocks=pb.BlockCounts(
                total=stats.blocks.total,
                free=stats.blocks.free,
                cached=stats.blocks.cached,
                used=stats.blocks.used,
                pinned=stats.blocks.pinned,
                quarantined=stats.blocks.quarantined,
            ),
            running=stats.running,
            waiting=stats.waiting,
            waiting_for_kv=stats.waiting_for_kv,
            ready=ready,
            reason=reason,
            used_slots=stats.used_slots,
            allocated_slots=stats.allocated_slots,
            backend=who.backend,
            dtype=who.dtype,
            block_size=who.block_size,
            max_model_len=who.max_model_len,
            cpus=who.cpus,
            threads=who.threads,
        )


def _stall(stats: EngineStats) -> str:
    """Says since when no step has ended although there is work; "" if one has of late."""
    pending = stats.running + stats.waiting
    stalled_s = time.monotonic() - stats.last_progress_s
    limit_s = max(STALL_S, _STALL_STEPS * stats.last_step_s)
    if not pending or stalled_s <= limit_s:
        return ""
    return f"no step finished for {stalled_s:.1f} s with {pending} sequences pending (limit {limit_s:.1f} s)"
