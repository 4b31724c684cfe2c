"""One child process of the supervisor: how it is started, how it ends, what is known of it."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import services

Role = Literal["redis", "kv_transfer", "prefill", "decode", "gateway"]

_LAUNCHER = Path(__file__).with_name("launcher.py")
_KILL_WAIT_S = 5.0


class ProcessState(enum.StrEnum):
    """Where a process stands, as its supervisor sees it.

    WAITING -> STARTING -> READY -> STOPPING -> STOPPED
                  ^----- RESTARTING <-'
    STARTING -> FAILED: it ended, or was not ready in time, before it had ever been ready
    """

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to run.

    Attributes:
        name: Unique in the cluster; names the log file.
        worker_id: Of the worker that it is or stands beside; "" for others.
        environment: On top of the supervisor's own.
        log_path: Both output streams are appended to it.
        stop_grace_s: From SIGTERM to SIGKILL.
        restart_after_s: Pause before the restart that follows the first of several deaths.
        module: That the command runs, where a spare process may run it instead, see `spare`; "" = none may.
    """

    name: str
    role: Role
    command: tuple[str, ...]
    log_path: Path
    worker_id: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    stop_grace_s: float = 10.0
    restart_after_s: float = 0.5
    module: str = ""


def python_module(module: str) -> tuple[str, ...]:
    """Command that runs one of our modules. `-P`: nothing in the caller's directory shadows a module of ours."""
    return (sys.executable, "-P", "-m", module)


class ManagedProcess:
    """The current life of one process. Its supervisor owns it.

    Attributes:
        detail: One phrase about the state, for people.
        restarts: Lives before this one.
        has_been_ready: In any life.
    """

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.state = ProcessState.WAITING
        self.detail = ""
        self.restarts = 0
        self.has_been_ready = False
        self.started_s = 0.0
        self.ready_s = 0.0
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """None unless running."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self, spare: asyncio.subprocess.Process | None = None) -> None:
        """Starts a life: that of `spare`, if there is one.

        Raises:
            OSError: The system refuses to run it.
        """
        self.started_s, self.ready_s = time.monotonic(), 0.0
        self.state, self.detail = ProcessState.STARTING, ""
        if spare is not None:
            self._process = spare
            return
        with self.spec.log_path.open("ab") as log:
            self._process = await start_process(self.spec.command, self.spec.environment, output=log)

    async def wait(self) -> int:
        """Exit status of the current life, negative for a signal."""
        if self._process is None:
            raise RuntimeError(f"{self.spec.name} was not started")
        return await self._process.wait()

    def mark_ready(self) -> None:
        """It serves."""
        self.state, self.detail = ProcessState.READY, ""
        self.ready_s = time.monotonic()
        self.has_been_ready = True

    async def stop(self, hurry: asyncio.Event) -> None:
        """SIGTERM, then SIGKILL to all of its session after the grace period or as soon as `hurry` is set."""
        process = self._process
        if process is None or process.returncode is not None:
            if self.state is not ProcessState.FAILED:
                self.state, self.detail = ProcessState.STOPPED, ""
            return
        self.state, self.detail = ProcessState.STOPPING, ""
        _signal(process.pid, signal.SIGTERM)
        ended = asyncio.ensure_future(process.wait())
        hurried = asyncio.ensure_future(hurry.wait())
        await asyncio.wait({ended, hurried}, timeout=self.spec.stop_grace_s, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not ended.done():
            self.detail = "killed"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        await asyncio.wait({ended}, timeout=_KILL_WAIT_S)
        self.state = ProcessState.STOPPED


async def start_process(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    stdin: int = asyncio.subprocess.DEVNULL,
    output: int | IO[bytes],
) -> asyncio.subprocess.Process:
    """A child in a session of its own: Ctrl-C in a terminal reaches only the supervisor, which keeps order.

    Its environment is ours and what is given here; both of its output streams go to `output`.

    Raises:
        OSError: The system refuses to run it.
    """
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid())),
        *command,
        env={**with_our_packages(os.environ), **environment},
        stdin=stdin,
        stdout=output,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a log file; empty when there is none."""
    try:
        with path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - 64 * 1024))
            return log.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []


def describe_exit(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def with_our_packages(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which `python_module` finds our packages, also in a checkout that is not installed."""
    root = str(Path(services.__file__).parent.parent)
    inherited = environment.get("PYTHONPATH", "")
    path = f"{root}{os.pathsep}{inherited}" if inherited else root
    return {**environment, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
