"""What is done to a running suite. Every fault can be undone, and says whether this machine lets it be done."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.cli.state_file import read_state
from tests.chaos.partitions import partition
from tests.e2e.conftest import Suite

DECODERS = ("decode-0", "decode-1")
ENGINES = (*DECODERS, "prefill-0")
SIDECARS = tuple(f"{name}.transfer" for name in ENGINES)


@dataclass(frozen=True)
class Fault:
    """One entry of a plan.

    Attributes:
        kind: A key of `KINDS`.
        target: A process's name, or what the kind makes of it.
        at_s: When in its round.
        for_s: How long, where it lasts.
    """

    kind: str
    target: str
    at_s: float
    for_s: float

    def __str__(self) -> str:
        return f"{self.at_s:.2f} s: {self.kind} {self.target} ({self.for_s:.2f} s)"


class Saboteur:
    """Carries faults out. `control` is the file that the sidecars' sends obey."""

    def __init__(self, suite: Suite, control: Path) -> None:
        self._suite = suite
        self._control = control
        self._addresses: Mapping[str, str] = {}
        self._ended: set[int] = set()
        self.calm()

    def calm(self) -> None:
        """Bytes travel as they are."""
        self._set_flight({})

    def look(self, addresses: Mapping[str, str]) -> None:
        """Learns where the processes that may be cut off are now."""
        self._addresses = addresses

    def all_run(self) -> bool:
        """Whatever was ended has a successor, and every process is ready in its supervisor's eyes."""
        state = read_state(self._suite.run_dir)
        return state is not None and state.is_ready and not self._ended.intersection(p.pid for p in state.processes)

    async def inflict(self, fault: Fault) -> None:
        """Does it, and undoes it after its time."""
        await KINDS[fault.kind](self, fault)

    async def kill(self, fault: Fault) -> None:
        self._ended.add(self._signal(fault.target, signal.SIGKILL))

    async def terminate(self, fault: Fault) -> None:
        self._ended.add(self._signal(fault.target, signal.SIGTERM))

    async def pause(self, fault: Fault) -> None:
        pid = self._signal(fault.target, signal.SIGSTOP)
        try:
            await asyncio.sleep(fault.for_s)
        finally:
            if pid:
                _send(pid, signal.SIGCONT)

    async def flush_redis(self, fault: Fault) -> None:
        # Another fault may have it paused or dead just now.
        with contextlib.suppress(RedisError, OSError):
            async with Redis.from_url(self._suite.redis_url, socket_timeout=2) as redis:
                await redis.flushall()

    async def slow_redis(self, fault: Fault) -> None:
        with contextlib.suppress(RedisError, OSError):
            async with Redis.from_url(self._suite.redis_url, socket_timeout=5) as redis:
                await redis.execute_command("CLIENT", "PAUSE", int(fault.for_s * 1000), "ALL")

    async def in_flight(self, fault: Fault) -> None:
        """`target` is corrupt, cut, drop, reorder or delay."""
        self._set_flight({fault.target: 0.5})
        await asyncio.sleep(fault.for_s)
        self.calm()

    async def partition(self, fault: Fault) -> None:
        """Packets to and from a process's gRPC port vanish."""
        if fault.target in self._addresses:
            port = urlsplit(f"//{self._addresses[fault.target]}").port
            assert port is not None
            with partition(port, is_refused=fault.for_s <= 1):
                await asyncio.sleep(fault.for_s)

    def _set_flight(self, chances: dict[str, float]) -> None:
        scratch = self._control.with_suffix(".new")
        scratch.write_text(json.dumps(chances))
        scratch.replace(self._control)

    def _signal(self, name: str, number: signal.Signals) -> int:
        """Sends to the process that has the name now; returns its pid, 0 if there is none."""
        state = read_state(self._suite.run_dir)
        pid = next((p.pid for p in state.processes if p.name == name and p.pid), 0) if state else 0
        if pid:
            _send(pid, number)
        return pid


KINDS: dict[str, Callable[[Saboteur, Fault], Awaitable[None]]] = {
    "kill": Saboteur.kill,
    "terminate": Saboteur.terminate,
    "pause": Saboteur.pause,
    "in_flight": Saboteur.in_flight,
    "flush_redis": Saboteur.flush_redis,
    "slow_redis": Saboteur.slow_redis,
    "partition": Saboteur.partition,
}


def plan(rng: random.Random, length_s: float, kinds: list[str]) -> list[Fault]:
    """The faults of one round, one to three of them, in order."""
    faults = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind = rng.choice(kinds)
        target, for_s = _target(kind, rng), rng.uniform(0.2, 3.0)
        faults.append(Fault(kind, target, rng.uniform(0, 0.6 * length_s), for_s))
    return sorted(faults, key=lambda fault: fault.at_s)


def _target(kind: str, rng: random.Random) -> str:
    match kind:
        case "in_flight":
            return rng.choice(["corrupt", "cut", "drop", "reorder", "delay"])
        case "flush_redis" | "slow_redis":
            return "redis"
        case "terminate":
            return rng.choice(ENGINES)
        case "partition":
            return rng.choice([*ENGINES, *SIDECARS])
        case _:
            return rng.choice([*ENGINES, *DECODERS, *SIDECARS, "redis"])


def small_disk(size: str = "16m") -> tuple[Path | None, Callable[[], None]]:
    """A file system that a tier soon fills, where root may mount one; and what undoes it."""
    path = Path(tempfile.mkdtemp(prefix="tandem-small-disk-"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        path.rmdir()
        return None, lambda: None

    def undo() -> None:
        subprocess.run(["umount", "-l", str(path)], capture_output=True)
        path.rmdir()

    return path, undo


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
