"""How long transfers stop when a kv_transfer dies: from its death to the first prompt whose KV was fetched again.

    python -m loadtest.sidecar_restart_bench [--rounds 5]

A suite of one prefill and one decode worker answers short prompts, one after another, each computed by the prefill
worker and fetched by the decode worker. Meanwhile a sidecar is killed (SIGKILL), or UCX is made to abort it by damaged
connect messages. Every answer is compared with one before the death, and the workers must be the same processes
afterwards. `begins` is when the successor says its first word, `serves` when it serves, both by its log.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import signal
import statistics
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from loadtest.cluster import RunningCluster, cluster
from loadtest.detection_bench import Cluster
from loadtest.fuzz_ucx import be_admitted, fuzz_ucx, ucx_port

PROMPT = "The report was read twice and filed. Nobody asked for a second copy. " * 12
REST_S = 5.0
"""Between two deaths: whatever the supervisor prepares for the next one is ready again."""
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Resumption:
    """One death. Seconds since it.

    Attributes:
        begins, serves: Of the successor.
        fetched: When the first answer with fetched KV was complete.
        failed: Prompts without an answer, or with another one.
    """

    begins: float
    serves: float
    fetched: float
    failed: int


def ask(suite: Cluster) -> tuple[str, bool]:
    """A prompt in a cache of its own; gives the text, and whether its KV was fetched from the prefill worker."""
    reply = suite.complete(
        prompt=PROMPT, max_tokens=4, temperature=0, ignore_eos=True, cache_salt=uuid.uuid4().hex, timing=True
    )
    session = reply["timing"]["sessions"][0]
    return reply["choices"][0]["text"], session["mode"] == "remote_prefill" and session["fetched_blocks"] > 0


def resumption(suite: Cluster, name: str, end: Callable[[], None]) -> Resumption:
    """Ends a sidecar and asks until something is fetched again.

    Raises:
        TimeoutError: Nothing was.
    """
    expected, process, failed = ask(suite)[0], suite.process(name), 0
    end()
    died_at, died_s = time.time(), time.monotonic()
    while time.monotonic() - died_s < TIMEOUT_S:
        text, is_fetched = ask(suite)
        failed += text != expected
        if is_fetched:
            fetched_s = time.monotonic() - died_s
            begins, serves = (at - died_at for at in _life_begins(Path(process["log"])))
            return Resumption(begins, serves, fetched_s, failed)
    raise TimeoutError(f"nothing was fetched within {TIMEOUT_S} s of the death of {name}")


def kill(suite: Cluster, name: str) -> None:
    """SIGKILL."""
    os.kill(suite.process(name)["pid"], signal.SIGKILL)


def abort(running: RunningCluster, suite: Cluster, name: str, seed: int) -> None:
    """Sends damaged connect messages until UCX aborts the sidecar."""
    process = suite.process(name)

    async def fuzz() -> None:
        workers: Any = running.status()["workers"]
        worker = next(found for found in workers if found["worker_id"] == process["worker_id"])
        await be_admitted(worker["transfer"], worker["fingerprint"])
        for attempt in range(10):
            await fuzz_ucx(ucx_port(Path(process["log"])), seed=seed + 1000 * attempt, seconds=30)
            if _is_dead(process["pid"]):
                return
        raise RuntimeError(f"{name} survived every damaged message")

    asyncio.run(fuzz())


def _is_dead(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def _life_begins(log: Path) -> tuple[float, float]:
    """Unix times of the first word of the last life in a sidecar's log, and of its readiness."""
    lines = log.read_text(errors="replace").splitlines()
    first = max(index for index, line in enumerate(lines) if "] starting " in line)
    serving = next(line for line in lines[first:] if "] serving " in line)
    begins, serves = (datetime.fromisoformat(line.split(maxsplit=1)[0]).timestamp() for line in (lines[first], serving))
    return begins, serves


def report(what: str, found: list[Resumption]) -> None:
    """Prints medians and the longest."""
    columns = [(name, [getattr(one, name) for one in found]) for name in ("begins", "serves", "fetched")]
    times = ", ".join(f"{name} {statistics.median(all_s):.2f} s (max {max(all_s):.2f})" for name, all_s in columns)
    print(f"{what:34} {times}, {len(found)} times, {sum(one.failed for one in found)} wrong answers", flush=True)


def main() -> None:
    """Starts a suite, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with cluster(
        prefill=1, decode=1, options=("--threads", "1", "--kv-cache-bytes", "64MiB"), fetches_all=True
    ) as running:
        suite = Cluster(running.run_dir)
        workers = {name: suite.process(name)["pid"] for name in ("prefill-0", "decode-0")}
        holder, puller = "prefill-0.transfer", "decode-0.transfer"
        deaths: list[tuple[str, str, Callable[[int], None]]] = [
            ("holder's sidecar, SIGKILL", holder, lambda _: kill(suite, holder)),
            ("puller's sidecar, SIGKILL", puller, lambda _: kill(suite, puller)),
            ("holder's sidecar, aborted by UCX", holder, lambda number: abort(running, suite, holder, number)),
        ]
        for what, name, end in deaths:
            found = []
            for number in range(options.rounds):
                time.sleep(REST_S)
                found.append(resumption(suite, name, functools.partial(end, number)))
            report(what, found)
        survived = all(suite.process(name)["pid"] == pid for name, pid in workers.items())
        print("the workers are the same processes" if survived else "A WORKER WAS RESTARTED")


if __name__ == "__main__":
    main()
