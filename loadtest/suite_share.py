"""What the services cost: output tokens/s through HTTP streams and separate processes, over the engine's alone.

    python -m loadtest.suite_share --shape 135m --streams 32

The same checkpoint, requests (64, log-normal lengths, token ids) and cores; client and services share them with the
engine, as on a laptop. Rounds are interleaved, medians printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from loadtest.cluster import cluster
from loadtest.engine.contestant import Remote
from loadtest.engine.requests import TokenRequest, draw_requests
from loadtest.engine.shapes import SHAPES, checkpoint


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


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="135m", choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "tandem" / "bench-models")
    options = parser.parse_args()
    directory = checkpoint(options.shape, options.cache)
    requests = draw_requests(int(str(SHAPES[options.shape]["vocab_size"])), options.count)
    wanted = sum(request.output_tokens for request in requests)
    model = ("--model", str(directory), "--dtype", options.dtype, "--kv-cache-bytes", "1GiB")
    samples: dict[str, list[float]] = {"engine alone": [], "aggregated": [], "disaggregated": []}
    engine = Remote(f"tandem:{options.dtype}", directory, os.cpu_count() or 1)
    with cluster(prefill=0, decode=1, options=model) as whole, cluster(prefill=1, decode=1, options=model) as split:
        for number in range(options.rounds):
            seconds = engine.run(do="workload", count=options.count, how=str(options.streams))
            samples["engine alone"].append(wanted / seconds)
            for name, url in (("aggregated", whole.url), ("disaggregated", split.url)):
                seconds, tokens = asyncio.run(serve_all(url, requests, options.streams, f"round {number}"))
                if tokens != wanted:
                    raise RuntimeError(f"{name}: {tokens} output tokens, wanted {wanted}")
                samples[name].append(wanted / seconds)
    engine.close()
    table = Table(title=f"{options.shape}, {options.dtype}, {options.streams} streams, {options.count} requests")
    for column in ("", "output tokens/s", "of the engine alone"):
        table.add_column(column, justify="right")
    base = statistics.median(samples["engine alone"])
    for name, values in samples.items():
        table.add_row(name, f"{statistics.median(values):.0f}", f"{statistics.median(values) / base:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
