"""What the services cost: output tokens/s through HTTP streams and separate processes, over the engine's alone.

    python -m loadtest.suite_share --shape 135m --streams 32

The same checkpoint, requests (64, log-normal lengths, token ids) and cores; client and services share them with the
engine, as on a laptop. Rounds are interleaved, medians printed; then who used the cores while each suite served.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import time
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from loadtest.cluster import RunningCluster, cluster
from loadtest.cpu_time import CpuTime, cpu_time
from loadtest.engine import report
from loadtest.engine.contestant import Remote
from loadtest.engine.requests import TokenRequest, draw_requests
from loadtest.engine.shapes import SHAPES, checkpoint

PREFILL_WORKERS = {"aggregated": 0, "disaggregated": 1}


async def serve_all(url: str, requests: list[TokenRequest], streams: int, salt: str) -> tuple[float, int]:
    """Streams every request, `streams` at a time; returns seconds and the output tokens that the server counted."""
    gate = asyncio.Semaphore(streams)
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def one(request: TokenRequest) -> int:
            body = {
                "model": model,
                "prompt": request.prompt,
                "max_tokens": request.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "cache_salt": salt,
            }
            usage = 0
            async with gate, client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    raise RuntimeError((await response.aread()).decode())
                async for line in response.aiter_lines():
                    if '"usage":{' in line:
                        usage = json.loads(line[6:])["usage"]["completion_tokens"]
            return usage

        started_s = time.perf_counter()
        counts = await asyncio.gather(*(one(request) for request in requests))
        return time.perf_counter() - started_s, sum(counts)


class Suite:
    """One way of serving: its throughput by rounds, and the CPU time that its processes and the client used."""

    def __init__(self, name: str, running: RunningCluster) -> None:
        self.name = name
        self.tokens_per_s: list[float] = []
        self.seconds = 0.0
        self.used = CpuTime()
        self._running = running

    def serve(self, requests: list[TokenRequest], streams: int, salt: str) -> None:
        """One round.

        Raises:
            RuntimeError: Tokens are missing.
        """
        wanted = sum(request.output_tokens for request in requests)
        before = cpu_time(self._running.run_dir)
        seconds, tokens = asyncio.run(serve_all(self._running.url, requests, streams, salt))
        self.used += cpu_time(self._running.run_dir) - before
        if tokens != wanted:
            raise RuntimeError(f"{self.name}: {tokens} output tokens, wanted {wanted}")
        self.seconds += seconds
        self.tokens_per_s.append(wanted / seconds)


def print_throughput(title: str, alone: list[float], suites: list[Suite]) -> None:
    """Medians, and each as a part of the engine's."""
    table = Table(title=title)
    for column in ("", "output tokens/s", "of the engine alone"):
        table.add_column(column, justify="right")
    base = statistics.median(alone)
    for name, values in (("engine alone", alone), *((suite.name, suite.tokens_per_s) for suite in suites)):
        table.add_row(name, f"{statistics.median(values):.0f}", f"{statistics.median(values) / base:.2f}")
    Console().print(table)


def print_cpu_time(suite: Suite, cores: int) -> None:
    """What each process used, of all that the cores could give while requests were served."""
    table = Table(title=f"CPU time, {suite.name}")
    for column in ("process", "threads", "seconds", "of the cores"):
        table.add_column(column, justify="right")
    for (process, threads), seconds in suite.used.most_common():
        table.add_row(process, threads, f"{seconds:.2f}", f"{seconds / (suite.seconds * cores):.1%}")
    Console().print(table)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="135m", choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--suites", nargs="+", default=["aggregated", "disaggregated"], choices=list(PREFILL_WORKERS))
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "tandem" / "bench-models")
    parser.add_argument("--json", type=Path, help="the medians, into the report of loadtest.engine.compare")
    options = parser.parse_args()
    directory = checkpoint(options.shape, options.cache)
    requests = draw_requests(int(str(SHAPES[options.shape]["vocab_size"])), options.count)
    wanted = sum(request.output_tokens for request in requests)
    model = ("--model", str(directory), "--dtype", options.dtype, "--kv-cache-bytes", "1GiB")
    cores = len(os.sched_getaffinity(0))
    engine = Remote(f"tandem:{options.dtype}", directory, cores)
    alone: list[float] = []
    with contextlib.ExitStack() as stack:
        suites = [
            Suite(name, stack.enter_context(cluster(prefill=PREFILL_WORKERS[name], decode=1, options=model)))
            for name in options.suites
        ]
        for number in range(options.rounds):
            seconds = engine.run(do="workload", count=options.count, how=str(options.streams))
            alone.append(wanted / seconds)
            for suite in suites:
                suite.serve(requests, options.streams, f"round {number}")
    engine.close()
    title = f"{options.shape}, {options.dtype}, {options.streams} streams, {options.count} requests"
    print_throughput(title, alone, suites)
    for suite in suites:
        print_cpu_time(suite, cores)
    if options.json:
        rates = {"engine alone": alone, **{suite.name: suite.tokens_per_s for suite in suites}}
        medians = {name: statistics.median(values) for name, values in rates.items()}
        measured = {"streams": options.streams, "requests": options.count, "tokens_per_s": medians}
        report.add(options.json, {f"{options.shape}, {options.dtype}, suite": measured})


if __name__ == "__main__":
    main()
