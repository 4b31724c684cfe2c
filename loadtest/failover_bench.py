"""Streams whose decode worker is killed, or told to stop, in the middle: how long the pause is, and no token differs.

Each trial starts a stream, disturbs the worker that runs it after a random number of tokens, and reads to the end. The
pause is the longest gap between two tokens from the disturbance on; beside it stands the longest gap of undisturbed
streams. At least two decode workers are ready before each trial: a supervisor restarts one that dies often ever later.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from loadtest.bench import percentile
from loadtest.cluster import cluster
from loadtest.fleet import Fleet

FILLER = "The report was read twice and filed. Nobody asked for a second copy. "
NUM_DECODE = 3
MAX_TOKENS = 300


@dataclass(slots=True)
class Trial:
    """One stream."""

    text: str = ""
    arrivals_s: list[float] = field(default_factory=list)
    migrations: list[str] = field(default_factory=list)
    disturbed_s: float = 0.0

    @property
    def gap_s(self) -> float:
        """The longest pause that ended after the disturbance."""
        pairs = zip(self.arrivals_s, self.arrivals_s[1:], strict=False)
        return max((b - a for a, b in pairs if b > self.disturbed_s), default=0.0)


async def run_stream(url: str, seed: int, fleet: Fleet, after_tokens: int, signal_number: int | None) -> Trial:
    """Reads one stream; sends the signal to its worker after so many tokens, unless it is None.

    Raises:
        RuntimeError: The stream failed.
    """
    trial = Trial()
    body = {
        "model": "pydoc-mini",
        "prompt": FILLER * 20,
        "max_tokens": MAX_TOKENS,
        "ignore_eos": True,
        "temperature": 0.8,
        "seed": seed,
        "stream": True,
        "timing": True,
        "cache_salt": uuid.uuid4().hex,
    }
    async with (
        httpx.AsyncClient(timeout=60) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as reply,
    ):
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if timing := event.get("timing"):
                trial.migrations = timing["sessions"][0]["migrations"]
            if event["choices"] and event["choices"][0]["text"]:
                trial.text += event["choices"][0]["text"]
                trial.arrivals_s.append(time.perf_counter())
            if signal_number is not None and len(trial.arrivals_s) >= after_tokens:
                pid = (await fleet.running_decode_worker()).pid
                trial.disturbed_s = time.perf_counter()
                os.kill(pid, signal_number)
                signal_number = None
    return trial


async def measure(url: str, redis_url: str, trials: int, seed: int) -> dict[str, object]:
    """Interleaves kills and drains; every stream is compared with an undisturbed one of the same seed."""
    rng, report = random.Random(seed), dict[str, object]()
    gaps: dict[str, list[float]] = {"kill": [], "drain": [], "undisturbed": []}
    wrong = 0
    async with Fleet(redis_url) as fleet:
        for number in range(trials):
            for name, what in (("kill", signal.SIGKILL), ("drain", signal.SIGTERM)):
                await fleet.until_ready(3, timeout_s=120)
                calm = await run_stream(url, number, fleet, 0, None)
                trial = await run_stream(url, number, fleet, rng.randint(20, MAX_TOKENS // 2), what)
                wrong += trial.text != calm.text or not trial.migrations
                gaps[name].append(trial.gap_s)
                gaps["undisturbed"].append(calm.gap_s)
    for name, values in gaps.items():
        report[name] = {
            "streams": len(values),
            "p50_ms": round(1e3 * percentile(values, 0.5), 1),
            "p99_ms": round(1e3 * percentile(values, 0.99), 1),
        }
    return {**report, "wrong_or_not_migrated": wrong}


def main() -> None:
    """Starts a suite of one prefill and three decode workers, measures, prints; JSON with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="kills, and as many drains")
    parser.add_argument("--drain-timeout-s", type=float, default=0.0, help="how long a drain lets streams go on")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["TANDEM_WORKER_DRAIN_TIMEOUT_S"] = str(options.drain_timeout_s)
    with cluster(prefill=1, decode=NUM_DECODE, options=("--threads", "1", "--kv-cache-bytes", "64MiB")) as suite:
        state = json.loads((suite.run_dir / "state.json").read_text())
        figures = asyncio.run(measure(suite.url, state["redis_url"], options.trials, options.seed))
    report = {"hardware": f"{os.cpu_count()} cores", "seed": options.seed, **figures}
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
