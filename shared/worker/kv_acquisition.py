"""Gets a prompt's KV into this worker's cache before the sequence is scheduled, from wherever it is.

    own cache -> own host tier -> other holders -> a prefill worker -> (the engine computes what is left)

Each source extends the sequence's verified prefix; whichever fails leaves a shorter prefix and costs time, never
correctness. With a prefill worker, chunk i is fetched while chunk i+1 is computed there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import grpc
import structlog

from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from shared.engine.engine import Engine
from shared.engine.sequence import Sequence
from shared.identity import BlockHash, BlockId, Fingerprint, WorkerId
from shared.rpc.silence import until_unresponsive
from shared.worker.fetch_cost import FetchCosts, HolderClass
from shared.worker.kv_state import KvEvent, KvLife
from shared.worker.peers import Peers
from shared.worker.sidecar_link import Pull, SidecarLink, SidecarLost

log = structlog.get_logger(__name__)

MAX_BLOCKS_PER_PULL = 512  # so that a long prefix becomes usable piece by piece


@dataclass(slots=True)
class AcquisitionReport:
    """Where a prompt's blocks came from and what it took; owned by the acquisition until it returns.

    The counts of blocks are right at any time: choices that share the prompt may have their first token, with which the
    client is told what was cached, before the acquisition goes on from the fetch that brought it.

    Attributes:
        local_blocks: Found in this worker's cache.
        held_blocks: Fetched from the own tier or from another holder's cache.
        prefilled_blocks: Fetched from the prefill worker.
        prefill_cached_blocks: Of the prompt's blocks, how many the prefill worker had without computing.
        missed_blocks: Asked for and not got.
        skipped_blocks: Held elsewhere, and cheaper computed here than fetched.
    """

    local_blocks: int = 0
    held_blocks: int = 0
    prefilled_blocks: int = 0
    prefill_cached_blocks: int = 0
    missed_blocks: int = 0
    skipped_blocks: int = 0
    fetched_bytes: int = 0
    prefill_s: float = 0.0
    fetch_s: float = 0.0
    verify_s: float = 0.0
    prefill_worker: str = ""

    @property
    def mode(self) -> str:
        """`remote_prefill`, `fetched` or `local`: the farthest source that gave a block."""
        if self.prefilled_blocks:
            return "remote_prefill"
        return "fetched" if self.held_blocks else "local"


class KvAcquisition:
    """One sequence's search for KV. Runs on the event loop; the sequence is WAITING_FOR_KV meanwhile.

    Args:
        block_hashes: Of the prompt's blocks that are wanted, first block first; the last prompt token is never among
            them, because its logits are computed here.
        block_bytes: Of one block.
        costs: What this worker learnt about fetching.
        life: Of the sequence's KV, just queued; in SEARCHING or over when `run` returns.
        report: Takes what was found.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        link: SidecarLink,
        peers: Peers,
        worker_id: WorkerId,
        fingerprint: Fingerprint,
        block_size: int,
        block_bytes: int,
        costs: FetchCosts,
        prefill_timeout_s: float,
        sequence: Sequence,
        block_hashes: Seq[BlockHash],
        cache_salt: str,
        life: KvLife,
        report: AcquisitionReport,
    ) -> None:
        self._engine = engine
        self._link = link
        self._peers = peers
        self._worker_id = worker_id
        self._fingerprint = fingerprint
        self._block_size = block_size
        self._block_bytes = block_bytes
        self._costs = costs
        self._prefill_timeout_s = prefill_timeout_s
        self._sequence = sequence
        self._hashes = block_hashes
        self._cache_salt = cache_salt
        self._life = life
        self._held = 0
        self.report = report

    @property
    def _is_complete(self) -> bool:
        return self._held >= len(self._hashes)

    async def run(self, holders: Seq[pb.HolderHint], prefill_candidates: Seq[pb.PeerRef]) -> AcquisitionReport:
        """Holds as long a verified prefix as can be had, then returns; never raises for a peer's failure."""
        self._life.apply(KvEvent.SEARCH)
        self._attach_cached()
        await self._fetch_from_holders(holders, is_last_resort=not prefill_candidates)
        for candidate in prefill_candidates:
            if self._is_complete or not self._link.is_attached:
                break
            await self._prefill_at(candidate)
        return self.report

    def _attach_cached(self) -> None:
        before = self._held
        self._held = self._engine.attach_cached(self._sequence)
        self.report.local_blocks += self._held - before

    async def _fetch_from_holders(self, holders: Seq[pb.HolderHint], *, is_last_resort: bool) -> None:
        own_first = sorted(holders, key=lambda hint: (hint.holder.worker_id != self._worker_id, -hint.num_blocks))
        for hint in own_first:
            if self._is_complete or not self._link.is_attached:
                return
            holder_id = "" if hint.holder.worker_id == self._worker_id else hint.holder.worker_id
            end = min(hint.num_blocks, len(self._hashes))
            # What a prefill worker would compute would have to be fetched as well.
            if is_last_resort and not self._is_worth_fetching(holder_id, end):
                self.report.skipped_blocks += max(0, end - self._held)
                continue
            await self._fetch(holder_id, hint.holder.incarnation, end)

    def _is_worth_fetching(self, holder_id: str, end: int) -> bool:
        num_blocks = end - self._held
        return self._costs.is_worth_fetching(
            _holder_class(holder_id),
            num_bytes=num_blocks * self._block_bytes,
            num_tokens=num_blocks * self._block_size,
            prefill_tokens_per_s=self._engine.stats().prefill_tokens_per_s,
        )

    async def _prefill_at(self, candidate: pb.PeerRef) -> None:
        """Asks one prefill worker for the rest and fetches as it seals."""
        peer = self._peers.prefill_worker(candidate)
        if peer is None:
            return
        # The call must cover whole blocks only: what follows is computed here.
        num_blocks = len(self._hashes)
        request = pb.PrefillRequest(
            session_id=self._sequence.session_id,
            incarnation=candidate.incarnation,
            fingerprint=self._fingerprint,
            token_ids=self._sequence.token_ids[: num_blocks * self._block_size],
            cache_salt=self._cache_salt,
            num_blocks=num_blocks,
            priority=self._sequence.priority,
            tenant=self._sequence.tenant,
        )
        if self._held:
            own = pb.PeerRef(worker_id=self._worker_id, incarnation=self._link.incarnation or "")
            request.holders.append(pb.HolderHint(holder=own, num_blocks=self._held))
        started_s = time.monotonic()
        call = peer.stub.Prefill(request)
        progress = _Progress()
        helpers = asyncio.create_task(progress.read(call)), asyncio.create_task(progress.watch(peer.stub))
        try:
            while not self._is_complete:
                sealed = await asyncio.wait_for(progress.beyond(self._held), self._prefill_timeout_s)
                if sealed <= self._held:
                    break
                self.report.prefill_cached_blocks = progress.cached_blocks
                if not await self._fetch(peer.worker_id, peer.transfer_incarnation, sealed, is_prefilled=True):
                    break
        except TimeoutError:
            log.warning("prefill_timed_out", session_id=self._sequence.session_id, worker_id=peer.worker_id)
        finally:
            call.cancel()  # ends the pins
            for helper in helpers:
                helper.cancel()
            if progress.error:
                log.warning("prefill_failed", worker_id=peer.worker_id, error=progress.error)
            self.report.prefill_s += (progress.last_s or time.monotonic()) - started_s
            self.report.prefill_worker = peer.worker_id

    async def _fetch(self, holder_id: str, incarnation: str, end: int, *, is_prefilled: bool = False) -> int:
        """Fetches blocks `[held, end)` from one holder; returns how many were verified and committed."""
        started_s, before = time.monotonic(), self._held
        while self._held < end:
            wanted = self._hashes[self._held : min(end, self._held + MAX_BLOCKS_PER_PULL)]
            block_ids = self._engine.reserve(self._sequence, len(wanted))
            if not block_ids:
                break  # no room: the scheduler decides when there is some
            self._life.apply(KvEvent.FETCH)
            pull = Pull(self._sequence.session_id, holder_id, incarnation, wanted[: len(block_ids)], block_ids)
            # Shielded: a cancelled acquisition must not forget slots that the transport still writes.
            committed = await asyncio.shield(asyncio.ensure_future(self._pull_and_settle(pull, is_prefilled)))
            self._held += committed
            if committed < len(wanted):
                break
        self.report.fetch_s += time.monotonic() - started_s
        return self._held - before

    async def _pull_and_settle(self, pull: Pull, is_prefilled: bool) -> int:
        """One pull and the fate of each of its slots: committed and counted, freed, or quarantined."""
        try:
            committed = await self._pull(pull)
        finally:
            self._life.apply(KvEvent.SETTLE)
        if is_prefilled:
            self.report.prefilled_blocks += committed
        else:
            self.report.held_blocks += committed
        return committed

    async def _pull(self, pull: Pull) -> int:
        block_ids = list(pull.block_ids)
        try:
            reply = await self._link.pull(pull)
        except SidecarLost as exc:
            log.warning("pull_lost", session_id=pull.session_id, blocks=len(block_ids), error=exc.message)
            self._engine.quarantine(block_ids)
            self.report.missed_blocks += len(block_ids)
            return 0
        verified = len(block_ids)
        if not all(reply.verified) or len(reply.verified) != len(block_ids):
            verified = next((i for i, ok in enumerate(reply.verified) if not ok), len(reply.verified))
            log.info(
                "fetch_incomplete",
                session_id=pull.session_id,
                holder=pull.holder_id or "tier",
                wanted=len(block_ids),
                missing=reply.missing,
                mismatched=reply.mismatched,
                error=reply.error,
            )
        self._costs.observe(_holder_class(pull.holder_id), reply.bytes, reply.seconds)
        self.report.fetched_bytes += reply.bytes
        self.report.verify_s += reply.verify_s
        self.report.missed_blocks += len(block_ids) - verified
        return self._settle(block_ids, pull.block_hashes, verified)

    def _settle(self, block_ids: list[BlockId], hashes: Seq[BlockHash], verified: int) -> int:
        if self._sequence.is_finished:  # aborted meanwhile: the bytes have no owner any more
            self._engine.discard(block_ids)
            return 0
        self._engine.commit(self._sequence, block_ids[:verified], list(hashes[:verified]))
        self._engine.discard(block_ids[verified:])
        return verified


def _holder_class(holder_id: str) -> HolderClass:
    return HolderClass.PEER if holder_id else HolderClass.OWN_TIER


class _Progress:
    """The latest word of a Prefill call."""

    def __init__(self) -> None:
        self.sealed_blocks = 0
        self.cached_blocks = 0
        self.error = ""
        self.last_s = 0.0
        self._began_s = time.monotonic()
        self._ended = False
        self._changed = asyncio.Event()

    async def read(self, call: grpc.aio.UnaryStreamCall[pb.PrefillRequest, pb.PrefillProgress]) -> None:
        """Follows the stream to its end."""
        try:
            async for message in call:
                self.sealed_blocks = message.sealed_blocks
                self.cached_blocks = message.cached_blocks
                self.last_s = time.monotonic()
                self._changed.set()
        except grpc.aio.AioRpcError as exc:
            self.error = f"{exc.code().name}: {exc.details()}"
        finally:
            self._end()

    async def watch(self, worker: rpc.WorkerAsyncStub) -> None:
        """Takes it for ended when the worker answers nothing any more."""
        self.error = f"the worker {await until_unresponsive(worker, lambda: self.last_s or self._began_s)}"
        self._end()

    def _end(self) -> None:
        self._ended = True
        self._changed.set()

    async def beyond(self, num_blocks: int) -> int:
        """Waits until more than `num_blocks` are sealed, or the stream ended; returns how many are."""
        while self.sealed_blocks <= num_blocks and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        return self.sealed_blocks
