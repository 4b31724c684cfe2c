"""Serves the own worker on a Unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from pathlib import Path
from threading import Thread

import structlog
from grpc.aio import ServicerContext

from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as rpc
from services.kv_transfer.attachment import Attachment
from services.kv_transfer.hints import BlockHints
from services.kv_transfer.holdings import Holdings
from services.kv_transfer.open_pulls import OpenPulls
from services.kv_transfer.prefault import prefault
from services.kv_transfer.pull import Puller, PullJob, PullOutcome
from services.kv_transfer.seal_checks import check_all, keep_checking, matching
from shared.errors import InvalidRequest, TandemError, Unavailable
from shared.identity import BlockHash, Incarnation, join_hashes, split_hashes
from shared.kv_arena import SharedArena
from shared.rpc.served_calls import ServedCalls
from shared.seal_table import SealTable

log = structlog.get_logger(__name__)

GONE_S = 2.0
"""The kernel closes a dead worker's connection within milliseconds."""
_GONE_POLL_S = 0.01
MAX_OPEN_PULLS = 4096
"""Many times as many as a worker has prompts that wait for KV."""


class KvTransferServicer(rpc.KvTransferServicer):
    """One worker at a time; a new Attach takes the place of the one before.

    Args:
        fetch_address: Announced to the worker, for its log.
        executor: For checksums.
        on_attachment: Called after a worker came or went.
        on_pull: Called with each outcome once its reply is on the way, for metrics.
    """

    def __init__(
        self,
        *,
        worker_id: str,
        incarnation: Incarnation,
        fetch_address: str,
        holdings: Holdings,
        hints: BlockHints,
        puller: Puller,
        executor: Executor,
        on_attachment: Callable[[], None],
        on_pull: Callable[[PullJob, PullOutcome], None],
    ) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._fetch_address = fetch_address
        self._holdings = holdings
        self._hints = hints
        self._puller = puller
        self._executor = executor
        self._pulls = OpenPulls()
        self._on_attachment = on_attachment
        self._on_pull = on_pull
        self.is_draining = False

    async def Attach(  # type: ignore[override]  # noqa: N802 - the stubs don't know coroutines that write by themselves
        self, request: pb.AttachRequest, context: ServicerContext[pb.AttachRequest, pb.Attached]
    ) -> None:
        """Open for the worker's life."""
        if request.worker_id != self._worker_id:
            raise InvalidRequest(f"this kv_transfer belongs to {self._worker_id}, not to {request.worker_id}")
        if self.is_draining:
            raise Unavailable("draining")
        attachment = Attachment(request)
        try:
            self._hints.arena_replaced([])
            await self._holdings.attach(attachment)
            checking = self._start_checking(attachment)
            if isinstance(attachment.arena, SharedArena):
                Thread(target=prefault, args=(attachment.arena,), name="prefault", daemon=True).start()
            log.info("worker_attached", incarnation=attachment.incarnation, blocks=attachment.arena.num_blocks)
            self._on_attachment()
            try:
                await context.write(
                    pb.Attached(
                        transfer_incarnation=self._incarnation,
                        fetch_address=self._fetch_address,
                        tier_blocks=len(self._holdings.tiers.memory),
                        disk_blocks=len(self._holdings.tiers.disk),
                    )
                )
                await attachment.ended.wait()
            finally:
                if checking is not None:
                    checking.cancel()
        finally:  # also of a worker that was gone before it had its answer
            if self._holdings.detach(attachment):
                orphaned = self._holdings.orphan.hashes() if self._holdings.orphan is not None else []
                self._hints.arena_replaced(orphaned)
                log.info("worker_detached", incarnation=attachment.incarnation, blocks=len(orphaned))
                self._on_attachment()
            await attachment.close()

    async def Adopt(  # noqa: N802
        self, request: pb.AdoptRequest, context: ServicerContext[pb.AdoptRequest, pb.AdoptReply]
    ) -> pb.AdoptReply:
        """Hands the arena of the worker's last life to its next one."""
        if request.worker_id != self._worker_id:
            raise InvalidRequest(f"this kv_transfer belongs to {self._worker_id}, not to {request.worker_id}")
        try:
            async with asyncio.timeout(GONE_S):
                while self._holdings.attachment is not None:  # noqa: ASYNC110 - its connection is about to break
                    await asyncio.sleep(_GONE_POLL_S)
        except TimeoutError:
            return pb.AdoptReply(refused="the worker's last life is still attached")
        path = Path(request.arena_path)
        try:
            arena = SharedArena.open(path, request.num_blocks, request.block_bytes)
            table = SealTable.open(
                Path(request.seal_table), request.num_blocks, request.block_bytes, request.fingerprint
            )
            is_known = await self._holdings.end_orphan()
        except (OSError, TandemError) as exc:
            return pb.AdoptReply(refused=str(exc))
        if is_known:  # it has been quiet since the worker died: what had no checksum yet can still get one
            await check_all(table, arena, self._executor)
        good = await matching(table, arena, self._executor)
        log.info("arena_handed_over", blocks=len(good), was_known=is_known)
        return pb.AdoptReply(
            block_ids=[slot.block_id for slot in good], block_hashes=join_hashes(slot.name for slot in good)
        )

    async def Pulls(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[pb.PullAsk], context: ServicerContext[pb.PullAsk, pb.PullAnswer]
    ) -> None:
        """Open for the worker's life; its end ends every pull on it."""
        # By itself: were it sent with the first answer, and that write cancelled, gRPC could not end the call any more.
        await context.send_initial_metadata(())
        await ServedCalls(self._pull, context.write, pb.PullAnswer, limit=MAX_OPEN_PULLS).run(request_iterator)

    async def _pull(self, request: pb.PullRequest, reply: Callable[[pb.PullReply], Awaitable[None]]) -> None:
        """Brings blocks into slots; the reply means that no transport writes them any more."""
        if self.is_draining:
            raise Unavailable("draining")
        job = PullJob(
            session_id=request.session_id,
            holder_id=request.holder_id,
            holder_incarnation=request.holder_incarnation,
            block_hashes=_hashes(request.block_hashes),
            block_ids=list(request.block_ids),
            timeout_s=request.timeout_s,
            pull_id=request.pull_id,
        )
        attachment = self._attached()
        with self._pulls.running((attachment.incarnation, job.pull_id)):
            outcome = await self._puller.pull(job, attachment)
        await reply(
            pb.PullReply(
                verified=outcome.verified,
                bytes=outcome.bytes,
                seconds=outcome.seconds,
                verify_s=outcome.verify_s,
                missing=outcome.missing,
                mismatched=outcome.mismatched,
                error=outcome.error,
            )
        )
        asyncio.get_running_loop().call_soon(self._on_pull, job, outcome)  # after the reply: the worker waits for that

    async def EndPulls(  # noqa: N802
        self, request: pb.EndPullsRequest, context: ServicerContext[pb.EndPullsRequest, pb.EndPullsReply]
    ) -> pb.EndPullsReply:
        """Returns when the pulls named are over for good."""
        incarnation = self._attached().incarnation
        await self._pulls.end((incarnation, pull_id) for pull_id in request.pull_ids)
        return pb.EndPullsReply()

    async def Save(  # noqa: N802
        self, request: pb.SaveRequest, context: ServicerContext[pb.SaveRequest, pb.SaveReply]
    ) -> pb.SaveReply:
        """Copies blocks into the tiers."""
        hashes = _hashes(request.block_hashes)
        if len(hashes) != len(request.block_ids):
            raise InvalidRequest(f"{len(hashes)} hashes for {len(request.block_ids)} blocks")
        attachment = self._attached()
        blocks = attachment.blocks(request.block_ids)
        unchanged = attachment.watch(hashes, request.block_ids)
        return pb.SaveReply(saved=await self._holdings.tiers.save(hashes, blocks, unchanged))

    async def Publish(  # noqa: N802
        self,
        request_iterator: AsyncIterator[pb.BlockEvents],
        context: ServicerContext[pb.BlockEvents, pb.PublishReply],
    ) -> pb.PublishReply:
        """Passes on what the worker sealed and evicted, as long as this worker is the attached one."""
        attachment = self._attached()
        async for events in request_iterator:
            if self._holdings.attachment is not attachment:
                raise Unavailable("another worker is attached")
            if events.reset:
                self._hints.arena_replaced(_hashes(events.sealed))
            else:
                self._hints.arena_changed(_hashes(events.sealed), _hashes(events.evicted))
            attachment.sealed.set()
        return pb.PublishReply()

    def _start_checking(self, attachment: Attachment) -> asyncio.Task[None] | None:
        if attachment.table is None:
            return None
        return asyncio.create_task(
            keep_checking(attachment.table, attachment.shared_arena, self._executor, attachment.sealed)
        )

    def _attached(self) -> Attachment:
        if self._holdings.attachment is None:
            raise Unavailable("no worker is attached")
        return self._holdings.attachment


def _hashes(raw: bytes) -> list[BlockHash]:
    try:
        return split_hashes(raw)
    except ValueError as exc:
        raise InvalidRequest(str(exc)) from exc
