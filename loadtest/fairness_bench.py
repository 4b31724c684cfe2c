"""What a hog costs a victim: time to first token of one tenant alone, and beside another one's fifty long streams.

    python -m loadtest.fairness_bench --hogs 50 --requests 60

Two API keys, two tenants. Rounds without and with the hog are interleaved; every victim's prompt is new to the cache.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from loadtest.bench import percentile
from loadtest.cluster import cluster

MODEL = "pydoc-mini"
VOCABULARY = 6000


def make_key(where: Path, tenant: str) -> dict[str, str]:
    """A key of a tenant, as a header."""
    command = [sys.executable, "-m", "services.cli", "keys", "create", tenant, "--where", str(where)]
    key = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return {"authorization": f"Bearer {key}"}


def body(rng: random.Random, prompt_tokens: int, max_tokens: int) -> dict[str, object]:
    """A streamed completion of random token ids."""
    prompt = [rng.randrange(300, VOCABULARY) for _ in range(prompt_tokens)]
    return {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}


async def first_token_s(client: httpx.AsyncClient, headers: dict[str, str], request: dict[str, object]) -> float:
    """Sends a request, reads all of it; seconds to its first token."""
    sent_s, first_s = time.perf_counter(), 0.0
    async with client.stream("POST", "/v1/completions", json=request, headers=headers) as reply:
        if reply.status_code != 200:
            raise RuntimeError((await reply.aread()).decode())
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                if "error" in json.loads(line[6:]):
                    raise RuntimeError(line)
                first_s = first_s or time.perf_counter() - sent_s
    return first_s


@contextlib.asynccontextmanager
async def hogging(client: httpx.AsyncClient, headers: dict[str, str], streams: int) -> AsyncIterator[None]:
    """Keeps so many long streams going."""
    rng = random.Random(99)

    async def forever() -> None:
        while True:
            await first_token_s(client, headers, body(rng, 64, 400))

    tasks = [asyncio.create_task(forever()) for _ in range(streams)]
    await asyncio.sleep(5)  # until all of them decode
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(1)


async def victims(
    client: httpx.AsyncClient, headers: dict[str, str], count: int, prompt_tokens: int, rng: random.Random
) -> list[float]:
    """One request after the other, with pauses."""
    samples = []
    for _ in range(count):
        await asyncio.sleep(rng.uniform(0.02, 0.1))
        samples.append(await first_token_s(client, headers, body(rng, prompt_tokens, 8)))
    return samples


async def measure(url: str, keys: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds to first token, without and with the hog."""
    hog, victim = make_key(keys, "hog"), make_key(keys, "victim")
    samples: dict[str, list[float]] = {"alone": [], "beside the hog": []}
    rng = random.Random(1)
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client,
        httpx.AsyncClient(base_url=url, timeout=300) as victims_client,
    ):
        await asyncio.sleep(2.5)  # the gateway learns of the keys
        await victims(victims_client, victim, 5, options.prompt_tokens, rng)
        for _ in range(options.rounds):
            count = options.requests // options.rounds
            samples["alone"] += await victims(victims_client, victim, count, options.prompt_tokens, rng)
            async with hogging(client, hog, options.hogs):
                samples["beside the hog"] += await victims(victims_client, victim, count, options.prompt_tokens, rng)
    return samples


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hogs", type=int, default=50)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--prefill", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.json"
        os.environ["TANDEM_GATEWAY_API_KEYS"] = str(keys)
        with cluster(prefill=options.prefill, decode=1) as running:
            samples = asyncio.run(measure(running.url, keys, options))
    table = Table(title=f"time to first token, {options.prompt_tokens} prompt tokens, {options.hogs} streams of a hog")
    for column in ("", "p50 ms", "p90 ms", "p99 ms"):
        table.add_column(column, justify="right")
    for name, values in samples.items():
        table.add_row(name, *(f"{1e3 * percentile(values, share):.1f}" for share in (0.5, 0.9, 0.99)))
    ratios = [percentile(samples["beside the hog"], s) / percentile(samples["alone"], s) for s in (0.5, 0.9, 0.99)]
    table.add_row("ratio", *(f"{ratio:.2f}" for ratio in ratios))
    Console().print(table)


if __name__ == "__main__":
    main()
