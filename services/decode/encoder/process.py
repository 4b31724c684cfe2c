"""The process of an encoder's worker from settings to exit: load, serve, drain.

encoder_main -> load -> EncoderQueue -> EncoderServicer -> gRPC -> directory
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import structlog

from protos import worker_pb2_grpc as worker_rpc
from services.decode.encoder.loading import LoadedEncoder, load
from services.decode.encoder.queue import EncoderQueue
from services.decode.encoder.servicer import EncoderServicer
from shared.directory.client import Directory
from shared.errors import InternalError
from shared.identity import WorkerId, new_incarnation
from shared.log import configure_logging
from shared.metrics.http import serve_metrics
from shared.metrics.worker import WorkerMetrics
from shared.rpc import bind_tcp, new_server
from shared.worker.settings import WorkerSettings
from shared.worker.status import WorkerIdentity, WorkerStatus

log = structlog.get_logger(__name__)

_CLOSE_GRACE_S = 1.0  # for the last words of calls that the drain ended


async def encoder_main(settings: WorkerSettings, directory: Path, stop: asyncio.Event) -> None:
    """Runs one worker until `stop` is set, then drains.

    Args:
        settings: Of the worker; what concerns KV is not used.
        directory: Of the checkpoint, an encoder's.
        stop: Set on SIGTERM.

    Raises:
        ConfigurationError: The model or a port cannot be had as configured.
        InternalError: The model failed; whoever supervises the process starts it anew.
    """
    configure_logging("decode", settings.log_level, settings.log_format)
    structlog.contextvars.bind_contextvars(worker_id=settings.worker_id)
    log.info("starting", **settings.masked())
    loaded = await asyncio.to_thread(load, settings, directory)
    if stop.is_set():
        return
    queue = EncoderQueue(
        loaded.encoder,
        max_batch_tokens=settings.max_batch_tokens,
        max_sequences=settings.max_sequences,
        max_waiting=settings.max_waiting,
        on_thread_start=loaded.cores.bind_this_thread,
    )
    async with _running(settings, loaded, queue) as computing:
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({computing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
    if failure := queue.stats().failure:
        raise InternalError(f"the encoder stopped: {failure}")
    log.info("stopped")


@contextlib.asynccontextmanager
async def _running(
    settings: WorkerSettings, loaded: LoadedEncoder, queue: EncoderQueue
) -> AsyncIterator[asyncio.Task[None]]:
    """Everything between load and exit, brought up and taken down in order; gives the task that computes."""
    status = WorkerStatus(_identity(settings, loaded), queue, None)
    metrics = WorkerMetrics(role="decode", model=status.identity.model)
    metrics.follow(queue.stats)
    directory = Directory(settings.redis_url, heartbeat_s=settings.heartbeat_s)
    server = new_server(checks_callers=settings.tls is not None)
    servicer = EncoderServicer(queue, status)
    worker_rpc.add_WorkerServicer_to_server(servicer, server)
    address = bind_tcp(server, settings.host, settings.port, tls=settings.tls)
    async with contextlib.AsyncExitStack() as stack:
        await directory.start()
        stack.push_async_callback(directory.close)
        stack.callback(queue.close)
        computing = asyncio.create_task(queue.run())
        stack.push_async_callback(_ended, computing)
        await server.start()
        stack.push_async_callback(server.stop, _CLOSE_GRACE_S)
        http = await serve_metrics(settings.host, settings.metrics_port, metrics.registry, status.readiness)
        stack.push_async_callback(http.close)
        started_at = time.time()
        await directory.announce(lambda: status.record(address, started_at))
        log.info("serving", address=address, incarnation=status.identity.incarnation, metrics=http.url)
        yield computing
        status.is_draining = True
        await directory.heartbeat_now()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(queue.until_idle(), settings.drain_timeout_s)
        await _ended(computing)
        await directory.withdraw()
        servicer.end_calls()


async def _ended(computing: asyncio.Task[None]) -> None:
    """What was left when the drain's time was over fails; its callers go on elsewhere."""
    computing.cancel()
    await asyncio.gather(computing, return_exceptions=True)


def _identity(settings: WorkerSettings, loaded: LoadedEncoder) -> WorkerIdentity:
    config = loaded.encoder.config
    return WorkerIdentity(
        worker_id=WorkerId(settings.worker_id),
        role="decode",
        incarnation=new_incarnation(),
        fingerprint=loaded.fingerprint,
        model=settings.served_model_name or Path(settings.model).name,
        dtype=loaded.dtype,
        backend="torch",
        block_size=0,
        max_model_len=config.max_model_len,
        vocab_size=config.vocab_size,
        block_bytes=0,
        cpus=str(loaded.cores),
        threads=loaded.cores.threads,
    )
