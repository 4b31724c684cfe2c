"""Cancels at random instants: from the client's disconnect until every block of every worker is free.

    python -m loadtest.cancel_bench --cancels 10000 --sessions 4 8 16

Rounds of several sessions each; how many is the load, and rounds of different loads take turns. Sessions start at
random instants within a window and are all cut off at its end, so that a session is cancelled anywhere between its
first byte (then it may not have reached a worker) and the middle of its output. What is measured is the time from the
disconnect until `Status` of every worker says that nothing is held, and nothing is held for a while after; the last
session of a round decides, so it is an upper bound for the others. Cutting off means what a vanished client does: the
TCP connection is reset without a word.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from loadtest.bench import percentile
from loadtest.cluster import cluster
from loadtest.fleet import Fleet

FILLER = "The report was read twice and filed. Nobody asked for a second copy. "
SETTLED_S = 0.04


@dataclass(slots=True)
class Outcome:
    """What the rounds of one load gave.

    Attributes:
        free_s: One per round: disconnect to all blocks free.
        last: In how many rounds a worker was among the last to hold blocks; "" = none held any at the first look.
        stages: How far the sessions were when they were cut off.
        wall_s: Of all rounds together.
    """

    num_cancels: int = 0
    free_s: list[float] = field(default_factory=list)
    last: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)
    wall_s: float = 0.0

    def summary(self) -> dict[str, object]:
        """For people and for JSON; times in milliseconds."""
        return {
            "cancels": self.num_cancels,
            "rounds": len(self.free_s),
            "p50_ms": round(1e3 * percentile(self.free_s, 0.5), 1),
            "p99_ms": round(1e3 * percentile(self.free_s, 0.99), 1),
            "max_ms": round(1e3 * max(self.free_s), 1),
            "share_within_250_ms": round(sum(s <= 0.25 for s in self.free_s) / len(self.free_s), 4),
            "last_to_hold": dict(self.last),
            "stages": dict(self.stages),
            "wall_s": round(self.wall_s, 1),
        }


class Victim:
    """One session that will be cut off."""

    def __init__(self, host: str, port: int, body: dict[str, object], stream: bool) -> None:
        self._host, self._port = host, port
        raw = json.dumps({**body, "stream": stream}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        self._request = head.encode() + f"content-length: {len(raw)}\r\n\r\n".encode() + raw
        self._writer: asyncio.StreamWriter | None = None
        self.stage = "before the request"

    async def run(self, delay_s: float) -> None:
        """Sends the request after the delay and reads until it is cancelled."""
        await asyncio.sleep(delay_s)
        reader, self._writer = await asyncio.open_connection(self._host, self._port)
        self.stage = "sent"
        self._writer.write(self._request)
        received = b""
        while data := await reader.read(4096):
            received += data
            self.stage = "streaming"
        self.stage = "finished"

    def cut(self) -> None:
        """Closes the connection at once, with a reset."""
        if self._writer is not None:
            self._writer.transport.abort()


async def run_cancels(
    url: str,
    fleet: Fleet,
    *,
    cancels: int,
    sessions: int,
    window_s: float,
    seed: int,
    timeout_s: float = 10.0,
    settled_s: float = 0.0,
) -> Outcome:
    """Runs rounds until so many sessions were cut off.

    Args:
        url: Of the gateway.
        fleet: Its workers.
        cancels: In all.
        sessions: Per round.
        window_s: Within which a round's sessions start.
        seed: Of everything that is drawn.
        timeout_s: Blocks that are held for longer are a leak.
        settled_s: Nothing may be held for so long after.

    Raises:
        TimeoutError: Blocks stayed held: a leak.
    """
    address, rng, outcome = urlsplit(url), random.Random(seed), Outcome()
    started_s = time.perf_counter()
    while outcome.num_cancels < cancels:
        await _round(address, fleet, outcome, rng, sessions, window_s, timeout_s, settled_s)
    outcome.wall_s = time.perf_counter() - started_s
    return outcome


async def _round(
    address: SplitResult,
    fleet: Fleet,
    outcome: Outcome,
    rng: random.Random,
    sessions: int,
    window_s: float,
    timeout_s: float,
    settled_s: float,
) -> None:
    host, port = address.hostname or "127.0.0.1", address.port or 80
    victims = [Victim(host, port, _body(rng), rng.random() < 0.7) for _ in range(sessions)]
    tasks = [asyncio.create_task(victim.run(rng.uniform(0, window_s))) for victim in victims]
    await asyncio.sleep(window_s)
    cut_s = time.perf_counter()
    for task, victim in zip(tasks, victims, strict=True):
        task.cancel()
        victim.cut()
    freed = await fleet.freed(timeout_s, settled_s=settled_s)
    await asyncio.gather(*tasks, return_exceptions=True)
    outcome.free_s.append(freed.at_s - cut_s)
    outcome.last.update(freed.last or {""})
    outcome.stages.update(victim.stage for victim in victims)
    outcome.num_cancels += sessions


def _body(rng: random.Random) -> dict[str, object]:
    """Short and long prompts, one or several choices; half of them share prefixes with others."""
    return {
        "model": "pydoc-mini",
        "messages": [{"role": "user", "content": FILLER * rng.choice([1, 4, 16, 40])}],
        "max_tokens": 400,
        "ignore_eos": True,
        "temperature": rng.choice([0.0, 1.0]),
        "n": rng.choice([1, 1, 1, 3]),
        "cache_salt": rng.choice(["", uuid.UUID(int=rng.getrandbits(128)).hex]),
    }


async def _measure(url: str, redis_url: str, options: argparse.Namespace) -> dict[str, object]:
    """The loads' summaries, by sessions per round."""
    address, rng = urlsplit(url), random.Random(options.seed)
    outcomes = {sessions: Outcome() for sessions in options.sessions}
    async with Fleet(redis_url) as fleet:
        await run_cancels(url, fleet, cancels=64, sessions=8, window_s=options.window_s, seed=0)
        started_s = time.perf_counter()
        while sum(outcome.num_cancels for outcome in outcomes.values()) < options.cancels and (
            not options.seconds or time.perf_counter() < started_s + options.seconds
        ):
            # As many cancels of each load, in random order.
            sessions = min(outcomes, key=lambda n: (outcomes[n].num_cancels, rng.random()))
            outcome = outcomes[sessions]
            await _round(address, fleet, outcome, rng, sessions, options.window_s, 10.0, SETTLED_S)
            outcome.wall_s = time.perf_counter() - started_s
    return {f"{sessions} sessions": outcome.summary() for sessions, outcome in outcomes.items()}


def main() -> None:
    """Starts a suite of one prefill and two decode workers, measures, prints; JSON with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cancels", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=0, help="stop after so long, with fewer cancels; 0 = never")
    parser.add_argument(
        "--sessions", type=int, nargs="+", default=[4, 8, 16], help="per round; as many cancels of each"
    )
    parser.add_argument("--window-s", type=float, default=0.2, help="within which a round's sessions start")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with cluster(
        prefill=1, decode=2, options=("--threads", "1", "--kv-cache-bytes", "64MiB"), fetches_all=True
    ) as suite:
        state = json.loads((suite.run_dir / "state.json").read_text())
        loads = asyncio.run(_measure(suite.url, state["redis_url"], options))
        report = {"hardware": f"{os.cpu_count()} cores", "seed": options.seed, **loads}
        print(json.dumps(report, indent=2), flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
