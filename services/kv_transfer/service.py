"""Puts the parts together, brings them up in order, and takes them down again.

lock -> UCX -> gRPC to peers -> gRPC to the worker -> directory        up
drain -> directory -> gRPC -> UCX -> lock                              down
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import structlog

from protos import kv_transfer_pb2 as pb
from protos import kv_transfer_pb2_grpc as rpc
from services.kv_transfer.control import KvTransferServicer
from services.kv_transfer.data_plane_watch import DataPlaneWatch
from services.kv_transfer.disk_tier import DiskState
from services.kv_transfer.fetch import KvFetchServicer
from services.kv_transfer.hints import BlockHints
from services.kv_transfer.holdings import Holdings
from services.kv_transfer.peers import TransferPeers
from services.kv_transfer.pull import Puller, PullJob, PullOutcome
from services.kv_transfer.settings import TransferSettings
from services.kv_transfer.socket_lock import locked_socket
from services.kv_transfer.tiers import Tiers
from shared.device_arena import open_device
from shared.directory.client import Directory
from shared.directory.records import NO_HOLDER_INDEX, TransferRecord
from shared.errors import ConfigurationError
from shared.identity import WorkerId, new_incarnation
from shared.log import configure_logging
from shared.metrics.http import serve_metrics
from shared.metrics.transfer import DiskFigures, TierFigures, TransferFigures, TransferMetrics
from shared.rpc import bind_tcp, bind_unix, new_server
from shared.transfer.grants import GrantBook
from shared.transfer.listen_filter import may_filter
from shared.transfer.receiver import BlockReceiver
from shared.transfer.sender import BlockSender
from shared.transfer.sleepless_thread import UCX_THREAD, SleeplessThread
from shared.transfer.transport import Transport, TransportError
from shared.transfer.ucx import UcxTransport

log = structlog.get_logger(__name__)

EXIT_TRANSPORT_FAILED = 70
_COPY_THREADS = 2
_HOUSEKEEPING_S = 10.0
_DRAIN_POLL_S = 0.05
_DRAIN_IDLE_S = 1.0
_STOP_GRACE_S = 0.5


async def transfer_main(settings: TransferSettings, stop: asyncio.Event) -> None:
    """Runs one kv_transfer until `stop` is set, then drains.

    Raises:
        ConfigurationError: A port, the socket, the device or a UCX option cannot be had as configured.
    """
    configure_logging("kv_transfer", settings.log_level, settings.log_format, worker_id=settings.worker_id)
    log.info("starting", **settings.masked())
    async with locked_socket(settings.socket), _data_plane(settings) as transport:
        service = TransferService(settings, transport)
        async with service.running() as tasks:
            await stopped_or_failed(tasks, stop)
            await service.drain()
    log.info("stopped")


async def stopped_or_failed(tasks: Sequence[asyncio.Task[None]], stop: asyncio.Event) -> None:
    """Returns when the process was told to stop.

    Raises:
        Exception: That ended one of the tasks, none of which ends by itself: without it this process would seem well.
    """
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    for task in tasks:
        if task.done():
            task.result()


@contextlib.asynccontextmanager
async def _data_plane(settings: TransferSettings) -> AsyncIterator[UcxTransport]:
    if "cuda" in settings.ucx_tls:
        open_device()
    transport = UcxTransport(
        settings.ucx_tls,
        settings.host,
        settings.ucx_port,
        on_failure=_die_of_transport_failure,
        interfaces=settings.ucx_interfaces,
        filters=_filters_listener(settings),
        admits_all=settings.ucx_admit == "any",
    )
    try:
        yield transport
    finally:
        await transport.stop()


def _filters_listener(settings: TransferSettings) -> bool:
    """Whether UCX's listener is filtered: it is, unless the kernel forbids it and nobody asked for it.

    Raises:
        ConfigurationError: It was asked for and is forbidden.
    """
    if may_filter():
        return True
    reason = "this kernel lets only processes with CAP_NET_ADMIN filter their sockets"
    if settings.ucx_admit == "callers" or settings.ucx_interfaces:
        wanted = "ucx_interfaces" if settings.ucx_interfaces else "ucx_admit=callers"
        raise ConfigurationError(f"{wanted} cannot be kept: {reason}; ucx_admit=auto goes without a filter")
    log.warning("ucx_listener_not_filtered", reason=reason, consequence="whoever reaches its port can connect to it")
    return False


def _die_of_transport_failure(error: BaseException) -> None:
    """Ends the process at once, before any call can be answered.

    The slots of open pulls may still be written, and only the end of this process stops that. The worker sees the
    connection break, quarantines those slots, and goes on.
    """
    log.critical("transport_failed", error=repr(error))
    os._exit(EXIT_TRANSPORT_FAILED)


class TransferService:
    """One life of the kv_transfer process.

    Args:
        transport: Not started yet; the caller stops it.
    """

    def __init__(self, settings: TransferSettings, transport: Transport) -> None:
        self._settings = settings
        self._transport = transport
        self.incarnation = new_incarnation()
        self._executor = ThreadPoolExecutor(_COPY_THREADS, thread_name_prefix="blocks")
        self._directory = Directory(settings.redis_url, heartbeat_s=settings.heartbeat_s, watch=(TransferRecord,))
        self._hints = BlockHints()
        self._tiers = Tiers(
            settings.tier_bytes, settings.disk_bytes, settings.disk_root, self._executor, self._hints.tier_changed
        )
        self._holdings = Holdings(self._tiers)
        self._grants = GrantBook()
        self._sender = BlockSender(self._grants, self._executor)
        self._receiver = BlockReceiver(transport, self._executor)
        self._peers = TransferPeers(self._directory.transfers, settings.tls)
        self._puller = Puller(settings.worker_id, self._tiers, self._peers, self._receiver)
        self._metrics = TransferMetrics(self._figures)
        self._watch = DataPlaneWatch(transport.probe, _die_of_transport_failure, SleeplessThread(UCX_THREAD).awake_s)
        self._mismatched_blocks = 0
        self.fetch_address = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Sequence[asyncio.Task[None]]]:
        """Everything up, in order; on exit down again, in reverse. Gives the background tasks.

        Raises:
            ConfigurationError: A port or a UCX option cannot be had.
        """
        settings = self._settings
        try:
            await self._transport.start(self._sender.serve)
        except TransportError as exc:
            raise ConfigurationError(f"UCX does not start with ucx_tls={settings.ucx_tls!r}: {exc}") from exc
        fetch_server, control_server = new_server(checks_callers=settings.tls is not None), new_server()
        self._fetch = KvFetchServicer(
            incarnation=self.incarnation,
            holdings=self._holdings,
            grants=self._grants,
            hints=self._hints,
            data_address=(settings.announced_host, self._transport.port),
            admit_source=self._transport.admit,
            status=self.status,
        )
        rpc.add_KvFetchServicer_to_server(self._fetch, fetch_server)
        _, _, port = bind_tcp(fetch_server, settings.host, settings.port, tls=settings.tls).rpartition(":")
        self.fetch_address = f"{settings.announced_host}:{port}"
        self._control = KvTransferServicer(
            worker_id=settings.worker_id,
            incarnation=self.incarnation,
            fetch_address=self.fetch_address,
            holdings=self._holdings,
            hints=self._hints,
            puller=self._puller,
            executor=self._executor,
            on_attachment=self._directory.heartbeat_soon,
            on_pull=self._note_pull,
        )
        rpc.add_KvTransferServicer_to_server(self._control, control_server)
        bind_unix(control_server, settings.socket)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._executor.shutdown, wait=False)
            stack.push_async_callback(self._tiers.disk.close)
            demoting = asyncio.create_task(self._tiers.run())
            stack.push_async_callback(_end, demoting)
            stack.callback(self._holdings.remove_orphan)
            stack.push_async_callback(self._receiver.close_idle, older_than_s=0)
            stack.push_async_callback(self._sender.stop)
            stack.push_async_callback(self._peers.close)
            await fetch_server.start()
            stack.push_async_callback(fetch_server.stop, None)  # peers' streams would not end by themselves
            await control_server.start()
            settings.socket.chmod(0o600)
            stack.push_async_callback(control_server.stop, _STOP_GRACE_S)
            housekeeping = asyncio.create_task(self._keep_house())
            stack.callback(housekeeping.cancel)
            watching = asyncio.create_task(self._watch.run())
            stack.callback(watching.cancel)
            await self._join_directory()
            stack.push_async_callback(self._directory.close)
            http = await serve_metrics(settings.host, settings.metrics_port, self._metrics.registry, self._readiness)
            stack.push_async_callback(http.close)
            log.info(
                "serving",
                incarnation=self.incarnation,
                fetch_address=self.fetch_address,
                transport=self._transport.name,
                ucx_port=self._transport.port,
                metrics=http.url,
            )
            yield demoting, housekeeping, watching

    async def drain(self) -> None:
        """Lets owed transfers finish: until the worker is gone or nobody asked for a second, within the bound.

        A worker that is told to stop at the same time may still owe blocks to peers that are fetching as it seals.
        """
        deadline_s = time.monotonic() + self._settings.drain_timeout_s
        idle_since_s = time.monotonic()
        while (now_s := time.monotonic()) < deadline_s:
            if self._active_transfers:
                idle_since_s = now_s
            elif self._holdings.attachment is None or now_s - idle_since_s > _DRAIN_IDLE_S:
                break
            await asyncio.sleep(_DRAIN_POLL_S)
        self._fetch.is_draining = self._control.is_draining = True
        if self._active_transfers:
            log.warning("transfers_cut_off", transfers=self._active_transfers)
        try:
            await self._tiers.flush(max(0.0, deadline_s - time.monotonic()))
        except TimeoutError:
            log.warning("blocks_not_copied_to_disk")
        if self._holdings.attachment is not None:
            self._holdings.attachment.ended.set()  # the worker hears it from the end of its call, not of its connection

    def status(self) -> pb.TransferStatusReply:
        """How this process stands."""
        return pb.TransferStatusReply(
            worker_id=self._settings.worker_id,
            incarnation=self.incarnation,
            pid=os.getpid(),
            fingerprint=self._holdings.fingerprint,
            attached=self._holdings.attachment is not None,
            tier_blocks=len(self._tiers.memory),
            tier_bytes=self._tiers.memory.used_bytes,
            tier_budget_bytes=self._tiers.memory.budget_bytes,
            disk_blocks=len(self._tiers.disk),
            disk_bytes=self._tiers.disk.used_bytes,
            disk_budget_bytes=self._tiers.disk.budget_bytes,
            disk_state=self._tiers.disk.state.value,
            active_transfers=self._active_transfers,
            sent_bytes=self._sender.sent_bytes,
            received_bytes=self._receiver.received_bytes,
            mismatched_blocks=self._mismatched_blocks,
            transport=self._transport.name,
        )

    def _figures(self) -> TransferFigures:
        return TransferFigures(
            attached=self._holdings.attachment is not None,
            active_transfers=self._active_transfers,
            sent_bytes=self._sender.sent_bytes,
            received_bytes=self._receiver.received_bytes,
            memory=self._memory_figures(),
            disk=self._disk_figures(),
            unpublished_blocks=0 if self._hints.holder is None else self._hints.holder.num_unpublished,
            stale_blocks=self._hints.stale_blocks,
            directory_healthy=self._directory.healthy,
        )

    def _memory_figures(self) -> TierFigures:
        memory = self._tiers.memory
        return TierFigures(len(memory), memory.used_bytes, memory.budget_bytes, memory.hits, memory.corrupt)

    def _disk_figures(self) -> DiskFigures:
        disk = self._tiers.disk
        counts = disk.counts
        return DiskFigures(
            tier=TierFigures(len(disk), disk.used_bytes, disk.budget_bytes, counts.hits, counts.corrupt),
            is_readable=disk.state is not DiskState.OFF,
            is_writable=disk.state is DiskState.ON,
            written_bytes=counts.written_bytes,
            read_bytes=counts.read_bytes,
            lost_blocks=counts.lost,
            failures=counts.failures,
        )

    def _readiness(self) -> tuple[bool, str]:
        if self._control.is_draining:
            return False, "draining"
        reason = self._watch.reason or ("" if self._holdings.attachment is not None else "no worker is attached")
        return not reason, reason

    @property
    def _active_transfers(self) -> int:
        return self._fetch.active + self._puller.active

    async def _join_directory(self) -> None:
        await self._directory.start()
        self._hints.holder = await self._directory.claim_holder(self.incarnation, self._hints.held)
        await self._directory.announce(self._record)

    def _record(self) -> TransferRecord:
        return TransferRecord(
            worker_id=WorkerId(self._settings.worker_id),
            incarnation=self.incarnation,
            fingerprint=self._holdings.fingerprint,
            fetch_address=self.fetch_address,
            holder_index=NO_HOLDER_INDEX if self._hints.holder is None else self._hints.holder.index,
            pid=os.getpid(),
        )

    def _note_pull(self, job: PullJob, outcome: PullOutcome) -> None:
        self._mismatched_blocks += outcome.mismatched
        self._metrics.observe_pull(
            asked=len(job.block_hashes),
            verified=sum(outcome.verified),
            missing=outcome.missing,
            mismatched=outcome.mismatched,
            seconds=outcome.seconds,
            verify_s=outcome.verify_s,
        )
        log.debug(
            "pulled",
            session_id=job.session_id,
            holder_id=job.holder_id,
            blocks=len(job.block_hashes),
            verified=sum(outcome.verified),
            missing=outcome.missing,
            mismatched=outcome.mismatched,
            bytes=outcome.bytes,
            ms=round(outcome.seconds * 1e3, 2),
            error=outcome.error,
        )

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_S)
            await self._receiver.close_idle()
            await self._peers.forget_gone()


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
