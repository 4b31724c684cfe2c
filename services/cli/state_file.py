"""`state.json`: what the supervisor says of its cluster, for other `tandem` commands and for scripts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from services.cli.process import ManagedProcess, Role

Phase = Literal["starting", "ready", "stopping", "failed"]


@dataclass(frozen=True, slots=True)
class ProcessEntry:
    """One process.

    Attributes:
        pid: None while it does not run.
        started_ticks: Start time of `pid` in clock ticks since boot: tells it from a later process of that number.
    """

    name: str
    role: Role
    worker_id: str
    state: str
    detail: str
    pid: int | None
    started_ticks: int
    restarts: int
    log: str


@dataclass(frozen=True, slots=True)
class ClusterState:
    """All of it.

    Attributes:
        error: Why the cluster failed to start; "" otherwise.
        startup_s: From the supervisor's start to readiness; 0 until then.
        tls_dir: Certificates of the services; "" = plaintext.
        arena_dir: Shared memory to remove when nothing runs any more.
    """

    url: str
    model: str
    redis_url: str
    run_dir: str
    log_dir: str
    arena_dir: str
    supervisor_pid: int
    phase: Phase
    processes: list[ProcessEntry]
    startup_s: float = 0.0
    tls_dir: str = ""
    error: str = ""

    @property
    def is_ready(self) -> bool:
        """Every process is."""
        return self.phase == "ready" and all(process.state == "ready" for process in self.processes)


def entry(process: ManagedProcess) -> ProcessEntry:
    """A process as of now."""
    pid = process.pid
    return ProcessEntry(
        name=process.spec.name,
        role=process.spec.role,
        worker_id=process.spec.worker_id,
        state=process.state.value,
        detail=process.detail,
        pid=pid,
        started_ticks=start_ticks(pid) if pid else 0,
        restarts=process.restarts,
        log=str(process.spec.log_path),
    )


def write_state(state: ClusterState) -> None:
    """Replaces the file in one step."""
    path = _path(Path(state.run_dir))
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=2))
    fresh.replace(path)


def read_state(run_dir: Path) -> ClusterState | None:
    """None when there is no cluster, or the file is of another version."""
    try:
        return msgspec.json.decode(_path(run_dir).read_bytes(), type=ClusterState)
    except (OSError, msgspec.MsgspecError):
        return None


def start_ticks(pid: int) -> int:
    """Start time of a process in clock ticks since boot; 0 when it is gone or a zombie."""
    try:
        # The command name, in parentheses, may hold anything; fields are counted from behind it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


def living(processes: Sequence[ProcessEntry]) -> list[int]:
    """Pids of those that still run."""
    return [p.pid for p in processes if p.pid and p.started_ticks and start_ticks(p.pid) == p.started_ticks]


def remove_leftovers(state: ClusterState) -> None:
    """Removes what a cluster leaves in the file system, its logs excepted. Only when none of its processes runs."""
    run_dir = Path(state.run_dir)
    for leftover in (*run_dir.glob("*.sock"), *run_dir.glob("*.sock.lock"), _path(run_dir)):
        leftover.unlink(missing_ok=True)
    arena_dir = Path(state.arena_dir)
    if arena_dir.name.startswith("tandem-") and arena_dir.exists() and arena_dir.stat().st_uid == os.getuid():
        shutil.rmtree(arena_dir, ignore_errors=True)


def _path(run_dir: Path) -> Path:
    return run_dir / "state.json"
