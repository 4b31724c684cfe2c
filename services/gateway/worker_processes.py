"""Several gateway processes on one port: `TANDEM_GATEWAY_WORKERS`.

The parent listens, and its children accept from the one socket that they inherit: whoever is idle takes the next
connection, and none is lost when a child ends. Each child is a gateway of its own, as if it were another replica;
bounds on concurrency are per child. Metrics come together in a directory that all of them write to. Children end with
their parent, however it ended.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile

import structlog
from prometheus_client.multiprocess import mark_process_dead

from services.gateway.settings import GatewaySettings
from shared.errors import ConfigurationError
from shared.lifecycle import EXIT_CONFIGURATION

log = structlog.get_logger(__name__)

RESTART_AFTER_S = 1.0
FOLLOW_EVERY_S = 1.0


async def supervise(settings: GatewaySettings, listener: socket.socket, stop: asyncio.Event) -> None:
    """Keeps `settings.workers` children running until `stop` is set, then lets them drain.

    Raises:
        ConfigurationError: A child cannot start as configured; the others are stopped.
    """
    with tempfile.TemporaryDirectory(prefix="tandem-metrics-") as metrics_dir:
        keepers = [
            asyncio.create_task(_keep_running(number, listener, metrics_dir, stop))
            for number in range(settings.workers)
        ]
        log.info("gateway_processes", count=settings.workers)
        results = await asyncio.gather(*keepers, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def follow_parent(stop: asyncio.Event) -> None:
    """In a child: sets `stop` when the parent is gone."""
    parent = os.getppid()
    while os.getppid() == parent:  # noqa: ASYNC110 - nothing tells a process that it was orphaned
        await asyncio.sleep(FOLLOW_EVERY_S)
    log.warning("parent_ended")
    stop.set()


async def _keep_running(number: int, listener: socket.socket, metrics_dir: str, stop: asyncio.Event) -> None:
    environment = {
        **os.environ,
        "TANDEM_GATEWAY_WORKERS": "1",
        "TANDEM_GATEWAY_LISTENER": str(listener.fileno()),
        "PROMETHEUS_MULTIPROC_DIR": metrics_dir,
    }
    while not stop.is_set():
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.gateway", env=environment, pass_fds=(listener.fileno(),)
        )
        exiting, stopping = asyncio.create_task(process.wait()), asyncio.create_task(stop.wait())
        await asyncio.wait((exiting, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if stop.is_set() and not exiting.done():
            process.send_signal(signal.SIGTERM)
        code = await exiting
        mark_process_dead(process.pid, metrics_dir)  # type: ignore[no-untyped-call]
        if code == EXIT_CONFIGURATION:
            stop.set()
            raise ConfigurationError("a gateway process could not start as configured; its own line says why")
        if not stop.is_set():
            log.warning("gateway_process_ended", number=number, pid=process.pid, exit_code=code)
            await asyncio.sleep(RESTART_AFTER_S)
