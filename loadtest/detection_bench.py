"""How soon a suite knows that a process hangs, and whether it takes a busy one for dead.

    tandem up --detach --prefill 1 --decode 2
    python -m loadtest.detection_bench [--run-dir DIR] [--rounds 5] [--busy-s 30]

Processes are stopped with SIGSTOP, which looks like a hang to everybody else: sockets stay open, nothing answers. Of a
kv_transfer also UCX's thread alone is stopped: the process notices by itself and ends, and a successor takes its place.
Of a decode worker also the thread that computes, in the middle of a stream: the process says so, and the stream goes on
at another worker.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from loadtest.frozen_thread import busiest_thread, cpu_share, data_plane_thread, frozen

TIMEOUT_S = 30.0
_LOOK_S = 0.02


class Cluster:
    """A suite as its state file describes it."""

    def __init__(self, run_dir: Path) -> None:
        self._state_path = run_dir / "state.json"
        self.http = httpx.Client(timeout=5.0, trust_env=False)

    @property
    def state(self) -> dict[str, Any]:
        """As of now."""
        found: dict[str, Any] = json.loads(self._state_path.read_text())
        return found

    def process(self, name: str) -> dict[str, Any]:
        """One process's entry."""
        return next(process for process in self.state["processes"] if process["name"] == name)

    def probe_url(self, name: str) -> str:
        """Where a worker or sidecar answers `/ready`, by its log."""
        if name == "gateway":
            return str(self.state["url"])
        log = Path(self.process(name)["log"]).read_text(errors="replace")
        return str(re.findall(r"metrics=(http://[0-9a-z.:]+)", log)[-1])

    def ready(self, name: str) -> tuple[bool, str]:
        """What a process says of itself."""
        reply = self.http.get(f"{self.probe_url(name)}/ready")
        return reply.status_code == 200, str(reply.json()["reason"])

    def decode_workers(self) -> list[str]:
        """Those that the gateway would send work to."""
        workers: list[str] = self.http.get(f"{self.state['url']}/ready").json()["decode_workers"]
        return workers

    def complete(self, **fields: Any) -> dict[str, Any]:
        """One request."""
        body = {"model": self.state["model"], "prompt": "What does json.dumps do?", "max_tokens": 8, **fields}
        reply = self.http.post(f"{self.state['url']}/v1/completions", json=body, timeout=TIMEOUT_S)
        found: dict[str, Any] = reply.raise_for_status().json()
        return found


def seconds_until(condition: Callable[[], bool]) -> float:
    """How long it takes.

    Raises:
        TimeoutError: Longer than `TIMEOUT_S`.
    """
    started_s = time.monotonic()
    while not condition():
        if time.monotonic() - started_s > TIMEOUT_S:
            raise TimeoutError(f"not within {TIMEOUT_S} s")
        time.sleep(_LOOK_S)
    return time.monotonic() - started_s


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process hangs as long as the context is open."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def hung_engine(cluster: Cluster, name: str) -> tuple[float, float]:
    """A decode worker hangs: until the gateway sends nothing there any more, and until it does again afterwards."""
    worker_id = cluster.process(name)["worker_id"]
    with stopped(cluster.process(name)["pid"]):
        detected_s = seconds_until(lambda: worker_id not in cluster.decode_workers())
    return detected_s, seconds_until(lambda: worker_id in cluster.decode_workers())


def hung_sidecar(cluster: Cluster, worker: str) -> tuple[float, float]:
    """A kv_transfer hangs: until its prefill worker says that it is not ready, and until it says that it is."""
    with stopped(cluster.process(f"{worker}.transfer")["pid"]):
        detected_s = seconds_until(lambda: not cluster.ready(worker)[0])
    return detected_s, seconds_until(lambda: cluster.ready(worker)[0])


def wedged_data_plane(cluster: Cluster, worker: str) -> tuple[float, float]:
    """UCX's thread hangs: until its kv_transfer says that it is not ready, and until a successor says that it is."""
    name = f"{worker}.transfer"
    pid = cluster.process(name)["pid"]
    with frozen(data_plane_thread(pid)) as has_ended:
        detected_s = seconds_until(lambda: not cluster.ready(name)[0])
        ended_s = seconds_until(has_ended)
    return detected_s, ended_s + seconds_until(lambda: cluster.process(name)["pid"] != pid and _is_ready(cluster, name))


def hung_step(cluster: Cluster, names: Sequence[str]) -> tuple[float, float]:
    """A step does not end: until its stream goes on at another worker, and until the worker gets work again."""
    stream = _Stream(cluster)
    stream.start()
    seconds_until(lambda: stream.num_events > 20)
    worker = max(names, key=lambda name: cpu_share(cluster.process(name)["pid"]))
    worker_id = cluster.process(worker)["worker_id"]
    with frozen(busiest_thread(cluster.process(worker)["pid"])):
        time.sleep(1)  # what was on its way has arrived
        before, started_s = stream.num_events, time.monotonic()
        seconds_until(lambda: stream.num_events > before)
        moved_s = 1 + time.monotonic() - started_s
        seconds_until(lambda: worker_id not in cluster.decode_workers())
    back_s = seconds_until(lambda: worker_id in cluster.decode_workers())
    stream.join(TIMEOUT_S)
    return moved_s, back_s


class _Stream(threading.Thread):
    """A long stream of a client, read as it comes."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self._cluster = cluster
        self.num_events = 0

    def run(self) -> None:
        body = {"model": self._cluster.state["model"], "prompt": "What does json.dumps do?", "max_tokens": 3000,
                "ignore_eos": True, "stream": True, "temperature": 0}  # fmt: skip
        with httpx.stream("POST", f"{self._cluster.state['url']}/v1/completions", json=body, timeout=60) as reply:
            for line in reply.iter_lines():
                self.num_events += line.startswith("data: {")


def _is_ready(cluster: Cluster, name: str) -> bool:
    try:
        return cluster.ready(name)[0]
    except httpx.HTTPError:  # between two lives
        return False


def false_alarms(cluster: Cluster, names: list[str], seconds: float, streams: int) -> tuple[int, int]:
    """Looks at `/ready` of busy processes; gives looks and alarms."""
    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            with contextlib.suppress(httpx.HTTPError):
                cluster.complete(prompt="Once upon a time " * 60, max_tokens=64, cache_salt=str(time.monotonic()))

    threads = [threading.Thread(target=load, daemon=True) for _ in range(streams)]
    for thread in threads:
        thread.start()
    looks = alarms = 0
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        for name in names:
            looks += 1
            alarms += not cluster.ready(name)[0]
        time.sleep(_LOOK_S)
    over.set()
    for thread in threads:
        thread.join(TIMEOUT_S)
    return looks, alarms


def main(run_dir: Path, rounds: int, busy_s: float) -> None:
    """Measures and prints."""
    cluster = Cluster(run_dir)
    decode = [p["name"] for p in cluster.state["processes"] if p["role"] == "decode"]
    prefill = [p["name"] for p in cluster.state["processes"] if p["role"] == "prefill"]
    engines = [hung_engine(cluster, decode[-1]) for _ in range(rounds)]
    sidecars = [hung_sidecar(cluster, prefill[0]) for _ in range(rounds)]
    measured = {"decode worker stopped": engines, "kv_transfer stopped": sidecars}
    try:
        measured["its UCX thread stopped"] = [wedged_data_plane(cluster, prefill[0]) for _ in range(rounds)]
        measured["a step does not end"] = [hung_step(cluster, decode) for _ in range(rounds)]
    except PermissionError as exc:
        print(f"single threads           not measured: {exc}")
    for what, times in measured.items():
        detected, back = zip(*times, strict=True)
        print(
            f"{what:24} known after {statistics.median(detected):.2f} s (max {max(detected):.2f}), "
            f"back after {statistics.median(back):.2f} s (max {max(back):.2f}), {rounds} rounds"
        )
    looks, alarms = false_alarms(cluster, ["gateway", *decode, *prefill], busy_s, streams=16)
    print(f"busy for {busy_s:g} s, 16 streams: {alarms} false alarms in {looks} looks at /ready")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path.home() / ".tandem" / "run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy-s", type=float, default=30)
    arguments = parser.parse_args()
    main(arguments.run_dir, arguments.rounds, arguments.busy_s)
