"""Brings a cluster's processes up, keeps them up, and takes them down in order.

    up:    redis | sidecars, workers, gateway            (any order works among the latter)
    down:  gateway | workers | sidecars | redis          (so that nothing waits for what is gone)

A process that ends before it was ever ready is a mistake in the set-up and ends the whole; later, it is restarted, out
of a spare process that has loaded its code already where there is one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.cli.process import ManagedProcess, ProcessSpec, ProcessState, Role, describe_exit, last_lines
from services.cli.spare import Spare
from shared.errors import ConfigurationError

START_STAGES: tuple[tuple[Role, ...], ...] = (("redis",), ("kv_transfer", "prefill", "decode", "gateway"))
STOP_STAGES: tuple[tuple[Role, ...], ...] = (("gateway",), ("decode", "prefill"), ("kv_transfer",), ("redis",))

_PROBE_S = 0.1
_LOG_LINES = 20


@dataclass(frozen=True, slots=True)
class Readiness:
    """What a probe found; `detail` says what a process that is not ready is doing."""

    is_ready: bool
    detail: str = ""


class Probe(Protocol):
    """Finds out whether a running process serves."""

    async def __call__(self, process: ManagedProcess) -> Readiness:
        """Must not raise, and must return within a second or so."""
        ...


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pause before a restart: doubles with every death, starts over after a life of `steady_s` in readiness."""

    limit_s: float = 30.0
    steady_s: float = 60.0

    def delay_s(self, deaths: int, first_s: float) -> float:
        """Before the restart that follows the n-th death in a row, n >= 1."""
        return float(min(self.limit_s, first_s * 2 ** min(deaths - 1, 30)))


class StartFailed(ConfigurationError):
    """A process could not be brought up.

    Attributes:
        log_lines: The end of its log.
    """

    code = "start_failed"

    def __init__(self, process: ManagedProcess, reason: str) -> None:
        super().__init__(f"{process.spec.name} {reason}")
        self.log_path = process.spec.log_path
        self.log_lines = last_lines(process.spec.log_path, _LOG_LINES)


class Supervisor:
    """Owns the processes. Lives on one event loop, whose thread must outlive them: the kernel ties them to it.

    Args:
        on_change: Called after every change of any process's state or detail; must be quick.

    Attributes:
        spares: By module.
    """

    def __init__(
        self,
        specs: Iterable[ProcessSpec],
        probe: Probe,
        *,
        on_change: Callable[[], None] = lambda: None,
        backoff: Backoff | None = None,
    ) -> None:
        self.processes = [ManagedProcess(spec) for spec in specs]
        self._probe = probe
        self._on_change = on_change
        self._backoff = backoff or Backoff()
        self._tasks: list[asyncio.Task[None]] = []
        self.spares = {module: Spare(module) for process in self.processes if (module := process.spec.module)}
        self._failure: asyncio.Future[None] | None = None
        self._is_stopping = False
        self._hurry = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Every process is."""
        return all(process.state is ProcessState.READY for process in self.processes)

    async def bring_up(self, timeout_s: float) -> None:
        """Starts everything and returns when all of it is ready.

        Raises:
            StartFailed: A process ended, could not be run, or was not ready in time. Nothing is stopped yet.
        """
        self._failure = asyncio.get_running_loop().create_future()
        self._tasks.append(asyncio.create_task(self._watch()))
        deadline_s = time.monotonic() + timeout_s
        for roles in START_STAGES:
            stage = [process for process in self.processes if process.spec.role in roles]
            self._tasks += [asyncio.create_task(self._keep(process)) for process in stage]
            await self._until_ready(stage, deadline_s, timeout_s)
        for spare in self.spares.values():
            await spare.prepare()

    async def shut_down(self) -> None:
        """Stops everything in order and returns when it is gone. Idempotent."""
        self._is_stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        for spare in self.spares.values():
            await spare.stop()
        for roles in STOP_STAGES:
            stage = [process for process in self.processes if process.spec.role in roles]
            stops = [asyncio.create_task(process.stop(self._hurry)) for process in stage]
            await asyncio.sleep(0)  # they say "stopping" first
            self._on_change()
            await asyncio.gather(*stops)
            self._on_change()

    def hurry(self) -> None:
        """What still runs is killed at once, in the order of the shutdown."""
        self._hurry.set()

    async def _until_ready(self, stage: Sequence[ManagedProcess], deadline_s: float, timeout_s: float) -> None:
        assert self._failure is not None
        while late := [process for process in stage if not process.has_been_ready]:
            if self._failure.done():
                self._failure.result()
            if time.monotonic() > deadline_s:
                what = f" ({late[0].detail})" if late[0].detail else ""
                late[0].state, late[0].detail = ProcessState.FAILED, "not ready in time"
                raise StartFailed(late[0], f"was not ready after {timeout_s:g} s{what}")
            await asyncio.sleep(_PROBE_S / 2)

    async def _keep(self, process: ManagedProcess) -> None:
        """One process's lives, one after another."""
        deaths = 0
        while True:
            try:
                spare = self.spares.get(process.spec.module) if process.has_been_ready else None
                await process.start(spare.become(process.spec) if spare else None)
                self._on_change()
                reason = describe_exit(await process.wait())
            except OSError as exc:
                reason = f"cannot be run: {exc}"
            if self._is_stopping:
                return
            if not process.has_been_ready:
                process.state, process.detail = ProcessState.FAILED, reason
                self._fail(StartFailed(process, reason))
                return
            was_steady = process.ready_s and time.monotonic() - process.ready_s > self._backoff.steady_s
            deaths = 1 if was_steady else deaths + 1
            delay_s = self._backoff.delay_s(deaths, process.spec.restart_after_s)
            process.restarts += 1
            process.state, process.detail = ProcessState.RESTARTING, f"{reason}; again in {delay_s:g} s"
            self._on_change()
            await asyncio.sleep(delay_s)

    def _fail(self, failure: StartFailed) -> None:
        self._on_change()
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(failure)

    async def _watch(self) -> None:
        """Asks every process that runs and is not ready yet, side by side."""
        while True:
            starting = [process for process in self.processes if process.state is ProcessState.STARTING and process.pid]
            await asyncio.gather(*(self._ask(process) for process in starting))
            await asyncio.sleep(_PROBE_S)

    async def _ask(self, process: ManagedProcess) -> None:
        pid = process.pid
        readiness = await self._probe(process)
        if process.pid != pid or process.state is not ProcessState.STARTING:
            return  # that life is over
        if readiness.is_ready:
            process.mark_ready()
        elif readiness.detail == process.detail:
            return
        else:
            process.detail = readiness.detail
        self._on_change()
