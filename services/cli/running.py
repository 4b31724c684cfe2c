"""One cluster's life, from nothing to nothing left: `run_cluster`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import httpx

from services.cli.cluster import ClusterSpec, plan
from services.cli.probes import ClusterProbe
from services.cli.run_directory import locked, rotate_logs
from services.cli.state_file import ClusterState, Phase, entry, living, read_state, remove_leftovers, write_state
from services.cli.supervisor import Supervisor
from shared.directory.client import Directory
from shared.directory.records import WorkerRecord

# Readiness is read from the directory; looking often costs one small Redis command each time.
_HEARTBEAT_S = 0.4
_ORPHAN_GRACE_S = 5.0


async def run_cluster(spec: ClusterSpec, observe: Callable[[ClusterState], None]) -> None:
    """Brings the cluster up, keeps it up until SIGINT or SIGTERM, takes it down. A second signal kills what lingers.

    Args:
        spec: What to run.
        observe: Called with every change; must be quick.

    Raises:
        ConfigurationError: Another cluster runs in that directory, or there is no Redis to run.
        StartFailed: A process did not come up; everything else was stopped again.
    """
    with locked(spec.run_dir):
        _end_orphans(spec)
        rotate_logs(spec.log_dir)
        redis_url, specs = plan(spec)
        spec.arena_dir.mkdir(mode=0o700, exist_ok=True)
        async with httpx.AsyncClient(trust_env=False) as http:
            directory = Directory(redis_url, heartbeat_s=_HEARTBEAT_S, watch=(WorkerRecord,))
            run = _Run(spec, redis_url, observe)
            run.supervisor = Supervisor(specs, ClusterProbe(spec, redis_url, directory, http), on_change=run.changed)
            try:
                await directory.start()
                await _until_stopped(run, spec.ready_timeout_s)
            finally:
                await directory.close()
                remove_leftovers(run.state())


async def _until_stopped(run: _Run, ready_timeout_s: float) -> None:
    stop = asyncio.Event()
    with _signals(stop, run.supervisor):
        bringing_up = asyncio.create_task(run.supervisor.bring_up(ready_timeout_s))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({bringing_up, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if bringing_up.done():
                bringing_up.result()
                run.enter("ready")
                await stopping
        finally:
            bringing_up.cancel()
            stopping.cancel()
            await asyncio.gather(bringing_up, stopping, return_exceptions=True)
            run.enter("stopping")
            await run.supervisor.shut_down()


class _Run:
    """Turns the supervisor's changes into states, to the file and to the observer."""

    supervisor: Supervisor

    def __init__(self, spec: ClusterSpec, redis_url: str, observe: Callable[[ClusterState], None]) -> None:
        self._observe = observe
        self._started_s = time.monotonic()
        self._state = ClusterState(
            url=spec.url,
            model=spec.served_model_name,
            redis_url=redis_url,
            run_dir=str(spec.run_dir),
            log_dir=str(spec.log_dir),
            arena_dir=str(spec.arena_dir),
            tls_dir=str(spec.tls_dir or ""),
            supervisor_pid=os.getpid(),
            phase="starting",
            processes=[],
        )

    def enter(self, phase: Phase) -> None:
        self._state = replace(self._state, phase=phase)
        if phase == "ready":
            self._state = replace(self._state, startup_s=time.monotonic() - self._started_s)
        self.changed()

    def changed(self) -> None:
        self._state = self.state()
        write_state(self._state)
        self._observe(self._state)

    def state(self) -> ClusterState:
        return replace(self._state, processes=[entry(process) for process in self.supervisor.processes])


@contextlib.contextmanager
def _signals(stop: asyncio.Event, supervisor: Supervisor) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            supervisor.hurry()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)


def _end_orphans(spec: ClusterSpec) -> None:
    """Ends what a supervisor that was killed left behind: SIGTERM reached it then, so what still runs is stuck."""
    state = read_state(spec.run_dir)
    if state is None:
        return
    deadline_s = time.monotonic() + _ORPHAN_GRACE_S
    while living(state.processes) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    kill_processes(state)
    remove_leftovers(state)


def kill_processes(state: ClusterState) -> list[int]:
    """SIGKILL to whatever still runs of a cluster whose supervisor is gone; returns the pids."""
    pids = living(state.processes)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return pids
