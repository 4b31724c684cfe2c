"""An engine process from settings to exit: load, attach, register, serve, drain.

worker_main -> load_engine -> WorkerParts -> servicer (prefill or decode) -> gRPC -> directory
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from protos import kv_transfer_pb2 as transfer_pb
from protos import kv_transfer_pb2_grpc as transfer_rpc
from protos import worker_pb2_grpc as worker_rpc
from shared.directory.client import Directory
from shared.directory.records import Role, TransferRecord, WorkerRecord
from shared.engine.engine import Engine
from shared.engine.sequence import Sequence as EngineSequence
from shared.errors import InternalError
from shared.identity import BlockHash, Fingerprint, WorkerId, new_incarnation
from shared.log import configure_logging
from shared.metrics.http import serve_metrics
from shared.metrics.worker import WorkerMetrics
from shared.rpc import bind_tcp, bind_unix, new_server
from shared.worker.arena_adoption import ask_kv_transfer
from shared.worker.block_host import BlockHostServicer
from shared.worker.drain import Drain, RoleServicer
from shared.worker.fetch_cost import FetchCosts
from shared.worker.guides import Guides
from shared.worker.hung import hand_back_when_hung
from shared.worker.kv_acquisition import AcquisitionReport, KvAcquisition
from shared.worker.kv_state import KvLife
from shared.worker.loading import LoadedEngine, load_engine
from shared.worker.peers import Peers
from shared.worker.save_ahead import save_ahead
from shared.worker.settings import WorkerSettings
from shared.worker.sidecar_link import SidecarLink, attach_request
from shared.worker.status import WorkerIdentity, WorkerStatus
from shared.worker.step_dispatch import StepDispatch

log = structlog.get_logger(__name__)

_CLOSE_GRACE_S = 1.0  # for the last words of calls that the drain ended
_FAILURE_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """What a role's servicer works with."""

    settings: WorkerSettings
    engine: Engine
    dispatch: StepDispatch
    link: SidecarLink
    peers: Peers
    status: WorkerStatus
    metrics: WorkerMetrics
    costs: FetchCosts
    guides: Guides

    def acquisition(
        self,
        sequence: EngineSequence,
        block_hashes: Sequence[BlockHash],
        cache_salt: str,
        life: KvLife,
        report: AcquisitionReport,
    ) -> KvAcquisition:
        """A search for the KV of one sequence."""
        who = self.status.identity
        return KvAcquisition(
            engine=self.engine,
            link=self.link,
            peers=self.peers,
            worker_id=who.worker_id,
            fingerprint=who.fingerprint,
            block_size=who.block_size,
            block_bytes=who.block_bytes,
            costs=self.costs,
            prefill_timeout_s=self.settings.prefill_timeout_s,
            sequence=sequence,
            block_hashes=block_hashes,
            cache_salt=cache_salt,
            life=life,
            report=report,
        )

    def observe(self, report: AcquisitionReport) -> None:
        """Counts what one acquisition brought."""
        self.metrics.observe_acquisition(
            mode=report.mode,
            local_blocks=report.local_blocks,
            held_blocks=report.held_blocks,
            prefilled_blocks=report.prefilled_blocks,
            missed_blocks=report.missed_blocks,
            skipped_blocks=report.skipped_blocks,
            fetched_bytes=report.fetched_bytes,
            fetch_s=report.fetch_s,
            prefill_s=report.prefill_s,
        )


ServicerFactory = Callable[[WorkerParts], RoleServicer]


async def worker_main(
    settings: WorkerSettings, role: Role, make_servicer: ServicerFactory, stop: asyncio.Event
) -> None:
    """Runs one worker until `stop` is set, then drains.

    Raises:
        ConfigurationError: The model, the arena or a port cannot be had as configured.
        InternalError: The engine failed; whoever supervises the process starts it anew.
    """
    configure_logging(role, settings.log_level, settings.log_format)
    structlog.contextvars.bind_contextvars(worker_id=settings.worker_id)
    log.info("starting", **settings.masked())
    loop = asyncio.get_running_loop()
    dispatch = StepDispatch(loop)
    metrics = WorkerMetrics(role=role, model=settings.served_model_name or settings.model)
    loaded = await _load(settings, role, dispatch, stop)
    if loaded is None:
        return
    try:
        async with _running(settings, role, make_servicer, dispatch, metrics, loaded) as tasks:
            await _stopped_or_failed(loaded.engine, tasks, stop)
    finally:
        loaded.close()
    if failure := loaded.engine.stats().failure:
        raise InternalError(f"the engine stopped: {failure}")
    log.info("stopped")


async def _stopped_or_failed(engine: Engine, tasks: list[asyncio.Task[None]], stop: asyncio.Event) -> None:
    """Returns when the process was told to stop, or when the engine cannot step any more.

    Raises:
        Exception: That ended one of the tasks, none of which ends by itself.
    """
    while not engine.stats().failure:
        for task in tasks:
            if task.done():
                task.result()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _FAILURE_POLL_S)
            return


async def _load(
    settings: WorkerSettings, role: Role, dispatch: StepDispatch, stop: asyncio.Event
) -> LoadedEngine | None:
    """Loads off the loop; None when the process was told to stop meanwhile."""
    loop = asyncio.get_running_loop()

    def ask(request: transfer_pb.AdoptRequest) -> transfer_pb.AdoptReply | None:
        return asyncio.run_coroutine_threadsafe(ask_kv_transfer(settings.transfer_socket, request), loop).result()

    loading = asyncio.ensure_future(asyncio.to_thread(load_engine, settings, role, dispatch.on_step, ask))
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    loaded = await loading
    if stop.is_set():
        loaded.close()
        return None
    return loaded


@contextlib.asynccontextmanager
async def _running(
    settings: WorkerSettings,
    role: Role,
    make_servicer: ServicerFactory,
    dispatch: StepDispatch,
    metrics: WorkerMetrics,
    loaded: LoadedEngine,
) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Everything that runs between load and exit, brought up and taken down in order; gives the background tasks."""
    engine = loaded.engine
    identity = _identity(settings, role, loaded)
    host_socket = settings.run_dir / f"{settings.worker_id}.host.sock"
    watched = (WorkerRecord, TransferRecord)
    directory = Directory(settings.redis_url, heartbeat_s=settings.heartbeat_s, watch=watched)
    peers = Peers(directory, identity.fingerprint, settings.tls)
    link = _link(settings, role, loaded, identity, host_socket, directory)
    status = WorkerStatus(identity, engine, link)
    parts = WorkerParts(settings, engine, dispatch, link, peers, status, metrics, FetchCosts(), loaded.guides)
    metrics.follow(engine.stats)
    dispatch.add_listener(lambda outputs: link.publish(outputs.sealed, outputs.evicted))
    dispatch.add_listener(metrics.observe_step)

    host_server = new_server()
    transfer_rpc.add_BlockHostServicer_to_server(BlockHostServicer(engine), host_server)
    bind_unix(host_server, host_socket)
    server = new_server(checks_callers=settings.tls is not None)
    servicer = make_servicer(parts)
    worker_rpc.add_WorkerServicer_to_server(servicer, server)
    address = bind_tcp(server, settings.host, settings.port, tls=settings.tls)

    async with contextlib.AsyncExitStack() as stack:
        await host_server.start()
        stack.push_async_callback(host_server.stop, 0)
        engine.start()
        stack.callback(engine.stop)
        stack.push_async_callback(link.close)
        await directory.start()
        stack.push_async_callback(directory.close)
        stack.push_async_callback(peers.close)
        saving = save_ahead(engine, link, memory_outlives_worker=loaded.memory.table is not None)
        running = [link.run(), saving, peers.run()]
        if role == "prefill":
            running.append(hand_back_when_hung(status, servicer))
        tasks = [asyncio.create_task(work) for work in running]
        for task in tasks:
            stack.callback(task.cancel)
        await server.start()
        stack.push_async_callback(server.stop, _CLOSE_GRACE_S)
        http = await serve_metrics(settings.host, settings.metrics_port, metrics.registry, status.readiness)
        stack.push_async_callback(http.close)
        started_at = time.time()
        await directory.announce(lambda: status.record(address, started_at))
        log.info("serving", address=address, incarnation=identity.incarnation, metrics=http.url)
        yield tasks
        await Drain(engine, link, status, directory, servicer).run(settings.drain_timeout_s)
        await asyncio.to_thread(engine.stop)  # before kv_transfer hears that the arena will not change any more
        loaded.is_left = link.is_attached and loaded.memory.table is not None


def _identity(settings: WorkerSettings, role: Role, loaded: LoadedEngine) -> WorkerIdentity:
    return WorkerIdentity(
        worker_id=WorkerId(settings.worker_id),
        role=role,
        incarnation=new_incarnation(),
        fingerprint=Fingerprint(loaded.fingerprint),
        model=loaded.served_name,
        dtype=loaded.dtype,
        backend=loaded.backend_name,
        block_size=loaded.layout.block_size,
        max_model_len=loaded.max_model_len,
        vocab_size=loaded.vocab_size,
        block_bytes=loaded.layout.block_bytes,
        cpus=str(loaded.cores),
        threads=loaded.cores.threads,
    )


def _link(
    settings: WorkerSettings,
    role: Role,
    loaded: LoadedEngine,
    identity: WorkerIdentity,
    host_socket: Path,
    directory: Directory,
) -> SidecarLink:
    return SidecarLink(
        settings.transfer_socket,
        attach_request(
            worker_id=identity.worker_id,
            incarnation=identity.incarnation,
            fingerprint=identity.fingerprint,
            arena=loaded.arena,
            seal_table=loaded.memory.table.path if loaded.memory.table else None,
            host_socket=host_socket,
            role=role,
        ),
        pull_timeout_s=settings.pull_timeout_s,
        sealed_hashes=loaded.engine.sealed_hashes,
        on_quiet=loaded.engine.release_quarantined,
        on_change=directory.heartbeat_soon,  # a prefill worker is ready as long as its kv_transfer answers
    )
