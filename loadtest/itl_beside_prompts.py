"""Inter-token latency of streams while long prompts are computed beside them, for several bounds on a step's time.

    python -m loadtest.itl_beside_prompts --max-step-s 0 0.1 0.05

A decode worker per bound, with everything else equal; 0 = bounded by tokens alone. Rounds of the workers take turns. In
a round some sessions stream, and beside them long prompts come one after the other, `--prompts` at a time. What is lost
to shorter steps is prompt tokens per second, beside the streams and, in rounds of their own, without any.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import time
import uuid
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from loadtest.bench import percentile
from loadtest.cluster import cluster
from loadtest.itl_under_transfer import Session, stream


@dataclass(slots=True)
class Measured:
    """Of one worker: gaps between tokens, and prompt tokens per second of its rounds."""

    itl_s: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)


async def keep_prompting(worker: dict[str, Any], tokens: int, rng: random.Random, done: list[int]) -> None:
    """One fresh prompt after the other, until cancelled; notes each one's tokens."""
    while True:
        prompt = [rng.randrange(300, 1800) for _ in range(tokens)]
        await Session().run(worker, prompt, 1, cache_salt=uuid.UUID(int=rng.getrandbits(128)).hex)
        done.append(tokens)


async def prompted(worker: dict[str, Any], work: Any, options: argparse.Namespace, rng: random.Random) -> float:
    """Prompt tokens per second while `work` is awaited."""
    done: list[int] = []
    started_s = time.perf_counter()
    prompting = [
        asyncio.create_task(keep_prompting(worker, options.prompt_tokens, random.Random(rng.getrandbits(64)), done))
        for _ in range(options.prompts)
    ]
    await work
    rate = sum(done) / (time.perf_counter() - started_s)
    for task in prompting:
        task.cancel()
    await asyncio.gather(*prompting, return_exceptions=True)
    return rate


async def measure(workers: dict[float, dict[str, Any]], options: argparse.Namespace) -> dict[float, Measured]:
    """Rounds of all workers, by turns."""
    rng = random.Random(options.seed)
    results = {bound: Measured() for bound in workers}

    async def streams(worker: dict[str, Any], gaps: list[float]) -> None:
        gaps += await stream(worker, options.streams, options.tokens)

    for round_number, (bound, worker) in itertools.product(range(options.rounds + 1), workers.items()):
        result = results[bound] if round_number else Measured()  # the first round is for the workers' estimates
        result.beside.append(await prompted(worker, streams(worker, result.itl_s), options, rng))
        result.alone.append(await prompted(worker, asyncio.sleep(options.alone_s), options, rng))
    return results


def main() -> None:
    """Prints a line per bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-step-s", type=float, nargs="+", default=[0.0, 0.1, 0.05])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=150, help="of each stream")
    parser.add_argument("--prompts", type=int, default=1, help="at a time")
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--alone-s", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options, passed_on = parser.parse_known_args()
    with contextlib.ExitStack() as stack:
        workers = {}
        for bound in options.max_step_s:
            with mock.patch.dict(os.environ, TANDEM_WORKER_MAX_STEP_S=str(bound)):
                running = stack.enter_context(cluster(prefill=0, decode=1, options=tuple(passed_on)))
            (workers[bound],) = running.status()["workers"]  # type: ignore[misc]
        results = asyncio.run(measure(workers, options))
    print(
        f"{options.streams} streams beside {options.prompts} x {options.prompt_tokens} tokens, {options.rounds} rounds"
    )
    for bound, result in results.items():
        p50, p99 = (1e3 * percentile(result.itl_s, share) for share in (0.5, 0.99))
        beside, alone = (percentile(rates, 0.5) for rates in (result.beside, result.alone))
        print(
            f"bound {bound:5.2f} s: ITL p50 {p50:6.1f} ms, p99 {p99:6.1f}, max {1e3 * max(result.itl_s):6.1f}; "
            f"prompt tokens/s {beside:6.0f} beside the streams, {alone:6.0f} alone"
        )


if __name__ == "__main__":
    main()
