"""Serves `Worker.Prefill`: a decode worker asks for a prompt's blocks, and fetches them while later ones are computed.

Before it: services/decode/session.py asked. After it: that worker's kv_transfer fetches from ours.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc

from protos import worker_pb2 as pb
from shared.engine.admission import check_token_ids
from shared.engine.sequence import Sequence, SequenceStatus
from shared.engine.step import StepOutputs
from shared.errors import (
    FingerprintMismatch,
    InvalidRequest,
    StaleIncarnation,
    TandemError,
    WorkerDraining,
    WorkerLost,
)
from shared.identity import SequenceId, SessionId, namespace_hash
from shared.worker.drain import RoleServicer
from shared.worker.kv_acquisition import AcquisitionReport
from shared.worker.kv_state import KvEvent, KvLife, new_kv_life
from shared.worker.process import WorkerParts


class PrefillServicer(RoleServicer):
    """Each call is one prefill-only sequence; its blocks stay pinned exactly as long as the call is open."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._engine = parts.engine
        self._changed: dict[SequenceId, asyncio.Event] = {}
        self._handed_back: set[SequenceId] = set()
        self._leaving = asyncio.Event()
        parts.dispatch.add_listener(self._on_step)

    async def Status(  # noqa: N802
        self, request: pb.StatusRequest, context: grpc.aio.ServicerContext[pb.StatusRequest, pb.StatusReply]
    ) -> pb.StatusReply:
        """How this process stands."""
        return self._parts.status.reply()

    async def Prefill(  # noqa: N802
        self,
        request: pb.PrefillRequest,
        context: grpc.aio.ServicerContext[pb.PrefillRequest, pb.PrefillProgress],
    ) -> AsyncIterator[pb.PrefillProgress]:
        """Streams how far the prompt is sealed, then waits for the caller to end the call."""
        sequence = self._sequence_of(request)
        changed = self._changed[sequence.sequence_id] = asyncio.Event()
        life = new_kv_life()
        try:
            await self._acquire(sequence, request, life)
            async for progress in self._follow(sequence, changed):
                yield progress
            await self._leaving.wait()  # the caller still fetches; its cancel ends the pins
        finally:
            life.apply(KvEvent.END)
            del self._changed[sequence.sequence_id]
            self._handed_back.discard(sequence.sequence_id)
            self._engine.abort([sequence.sequence_id])
            self._engine.release(sequence)

    def hand_back(self) -> int:
        """Ends the calls whose prompts are not complete; their callers compute the rest, or ask elsewhere."""
        self._handed_back = set(self._changed)
        for changed in self._changed.values():
            changed.set()
        return len(self._handed_back)

    def end_calls(self) -> None:
        """Ends the calls whose callers don't fetch any more."""
        self._leaving.set()

    def _sequence_of(self, request: pb.PrefillRequest) -> Sequence:
        who = self._parts.status.identity
        if request.incarnation != who.incarnation:
            raise StaleIncarnation(f"prefill worker {who.worker_id}: the call meant {request.incarnation}")
        if request.fingerprint != who.fingerprint:
            raise FingerprintMismatch(f"prefill worker {who.worker_id} serves {who.fingerprint}")
        if self._parts.status.is_draining:
            raise WorkerDraining(f"prefill worker {who.worker_id} is draining")
        wanted = request.num_blocks * who.block_size
        if not 0 < wanted <= len(request.token_ids):
            raise InvalidRequest(
                f"{request.num_blocks} blocks of {who.block_size} tokens asked for, {len(request.token_ids)} sent"
            )
        check_token_ids(request.token_ids, who.vocab_size)
        return Sequence(
            session_id=SessionId(request.session_id),
            token_ids=list(request.token_ids[:wanted]),
            num_prompt_tokens=wanted,
            sampling=None,
            namespace=namespace_hash(who.fingerprint, request.cache_salt),
            priority=request.priority,
            tenant=request.tenant,
            status=SequenceStatus.WAITING_FOR_KV,
        )

    async def _acquire(self, sequence: Sequence, request: pb.PrefillRequest, life: KvLife) -> None:
        """Fetches what others hold before anything is computed."""
        self._engine.submit([sequence])
        if request.holders:
            report = AcquisitionReport()
            acquisition = self._parts.acquisition(sequence, sequence.block_hashes, request.cache_salt, life, report)
            self._parts.observe(await acquisition.run(request.holders, ()))
            life.apply(KvEvent.ACQUIRE)
        else:
            life.apply(KvEvent.SHARE)
        self._engine.ready_for_schedule(sequence)

    async def _follow(self, sequence: Sequence, changed: asyncio.Event) -> AsyncIterator[pb.PrefillProgress]:
        told = -1
        while True:
            is_last = sequence.is_finished  # before the count: a step may end it while what came before is on its way
            if sequence.num_sealed_blocks > told:
                told = sequence.num_sealed_blocks
                yield self._progress(sequence)
            if is_last:
                return
            if sequence.sequence_id in self._handed_back:
                raise self._reason_to_hand_back()
            await changed.wait()
            changed.clear()

    def _reason_to_hand_back(self) -> TandemError:
        status = self._parts.status
        if status.is_draining:
            return WorkerDraining(f"prefill worker {status.identity.worker_id} is draining")
        return WorkerLost(f"prefill worker {status.identity.worker_id} finishes no step")

    def _progress(self, sequence: Sequence) -> pb.PrefillProgress:
        scheduled_s = sequence.first_scheduled_s
        return pb.PrefillProgress(
            sealed_blocks=sequence.num_sealed_blocks,
            cached_blocks=sequence.num_cached_tokens // self._parts.status.identity.block_size,
            queued_s=scheduled_s - sequence.arrival_s if scheduled_s else 0.0,
            compute_s=time.monotonic() - scheduled_s if scheduled_s else 0.0,
        )

    def _on_step(self, outputs: StepOutputs) -> None:
        for sequence in (*outputs.prefilled, *outputs.finished):
            if changed := self._changed.get(sequence.sequence_id):
                changed.set()
