"""What the block hints cost on a real Redis: memory per block and time per lookup, bitmaps against sets.

    python -m loadtest.directory_bench [--blocks 100000 1000000] [--holders 1 4] [--redis-url URL of an empty database]

Bitmaps go through `shared.directory` as the services use it. The sets are the obvious alternative: a set of holder
indices per block, written and expired in pipelines of the same size, read by one pipeline of SMEMBERS.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import redis
import redis.asyncio
import uvloop

from shared.directory.client import Directory
from shared.directory.hints import HINT_TTL_S
from shared.directory.holder import Holder
from shared.directory.redis_server import RedisServer
from shared.identity import BlockHash, Fingerprint, extend_hashes, namespace_hash, new_incarnation
from shared.log import configure_logging

PROMPT_BLOCKS = 1000
BATCH_BLOCKS = 256
REPEATS = 50
EXTRAPOLATED_BLOCKS = 10_000_000
MISSING = extend_hashes(namespace_hash(Fingerprint("nobody has it")), [0] * 16 * PROMPT_BLOCKS, 16)


@dataclass(frozen=True)
class Row:
    """One line of the table; per block and holder where it says so."""

    scheme: str
    holders: int
    bytes_per_block: float
    publish_us: float
    hit_us: float
    miss_us: float


async def measure_bitmaps(url: str, chains: Sequence[Sequence[BlockHash]], num_holders: int) -> Row:
    """Publishes every block by every holder, then looks prompts up, through `Directory`."""
    blocks = [block_hash for chain in chains for block_hash in chain]
    before = await used_memory(url)
    async with contextlib.AsyncExitStack() as stack:
        reader = await stack.enter_async_context(Directory(url, lookup_timeout_s=1.0))
        started = time.perf_counter()
        for _ in range(num_holders):
            directory = await stack.enter_async_context(Directory(url, background_timeout_s=5.0))
            holder = await directory.claim_holder(new_incarnation(), lambda: blocks)
            await published(holder)
        published_s = time.perf_counter() - started
        size = await used_memory(url) - before
        assert len(await reader.longest_prefixes(chains[0])) == num_holders
        hit_s = await median_s(lambda chain: reader.longest_prefixes(chain), chains)
        miss_s = await median_s(lambda chain: reader.longest_prefixes(chain), [MISSING])
    await flush(url)
    return row("bitmap", num_holders, size, published_s, hit_s, miss_s, len(blocks))


async def measure_sets(url: str, chains: Sequence[Sequence[BlockHash]], num_holders: int) -> Row:
    """The same with a set per block."""
    blocks = [block_hash for chain in chains for block_hash in chain]
    before = await used_memory(url)
    async with connection(url) as client:
        started = time.perf_counter()
        for holder in range(num_holders):
            for start in range(0, len(blocks), BATCH_BLOCKS):
                pipeline = client.pipeline(transaction=False)
                for block_hash in blocks[start : start + BATCH_BLOCKS]:
                    pipeline.execute_command("SADD", b"tkv:" + block_hash, holder)
                    pipeline.execute_command("EXPIRE", b"tkv:" + block_hash, HINT_TTL_S)
                await pipeline.execute()
        published_s = time.perf_counter() - started
        size = await used_memory(url) - before

        async def look_up(chain: Sequence[BlockHash]) -> dict[int, int]:
            pipeline = client.pipeline(transaction=False)
            for block_hash in chain:
                pipeline.execute_command("SMEMBERS", b"tkv:" + block_hash)
            return longest_of_sets(await pipeline.execute())

        assert len(await look_up(chains[0])) == num_holders
        hit_s = await median_s(look_up, chains)
        miss_s = await median_s(look_up, [MISSING])
        await client.flushdb()
        return row("set", num_holders, size, published_s, hit_s, miss_s, len(blocks))


async def published(holder: Holder) -> None:
    """Returns when every block's hint is in Redis."""
    while holder.num_unpublished:  # noqa: ASYNC110 - the holder has no such event: no service waits for it
        await asyncio.sleep(0.002)


def longest_of_sets(sets: Sequence[set[bytes]]) -> dict[int, int]:
    """Holder to the length of its unbroken prefix."""
    lengths: dict[int, int] = {}
    alive = set(sets[0]) if sets else set()
    for num_blocks, holders in enumerate(sets):
        for holder in alive - holders:
            lengths[int(holder)] = num_blocks
        alive &= holders
        if not alive:
            return lengths
    return lengths | {int(holder): len(sets) for holder in alive}


async def median_s(
    look_up: Callable[[Sequence[BlockHash]], Awaitable[object]], chains: Sequence[Sequence[BlockHash]]
) -> float:
    """Median duration of a lookup, over prompts in random order."""
    rng = random.Random(0)
    durations = []
    for _ in range(REPEATS):
        chain = rng.choice(chains)
        started = time.perf_counter()
        await look_up(chain)
        durations.append(time.perf_counter() - started)
    return statistics.median(durations)


def row(scheme: str, holders: int, size: int, published_s: float, hit_s: float, miss_s: float, num_blocks: int) -> Row:
    """Puts the figures into the table's units."""
    publish_us = 1e6 * published_s / (num_blocks * holders)
    return Row(scheme, holders, size / num_blocks, publish_us, 1e6 * hit_s, 1e6 * miss_s)


@contextlib.asynccontextmanager
async def connection(url: str) -> AsyncIterator[redis.asyncio.Redis]:
    """A plain client."""
    client = redis.asyncio.from_url(url, protocol=2)
    try:
        yield client
    finally:
        await client.aclose()


async def used_memory(url: str) -> int:
    """Bytes that Redis has allocated."""
    async with connection(url) as client:
        return int((await client.info("memory"))["used_memory"])


async def flush(url: str) -> None:
    """Empties the database."""
    async with connection(url) as client:
        await client.flushdb()


async def main(url: str, sizes: Sequence[int], holder_counts: Sequence[int], schemes: Sequence[str]) -> None:
    """Measures and prints."""
    async with connection(url) as client:
        if await client.dbsize():
            sys.exit(f"{url} is not empty; this measurement empties it")
        version = (await client.info("server"))["redis_version"]
    print(f"Redis {version}, redis-py {redis.__version__}, TTL on every key")
    print(
        f"{'':8}{'blocks':>12}{'holders':>8}{'bytes/block':>13}{'publish us':>12}"
        f"{'1,000-block hit us':>20}{'miss us':>10}"
    )
    largest: Row | None = None
    for num_blocks in sizes:
        chains = [
            extend_hashes(namespace_hash(Fingerprint("bench"), str(index)), [index] * 16 * PROMPT_BLOCKS, 16)
            for index in range(num_blocks // PROMPT_BLOCKS)
        ]
        for num_holders in holder_counts:
            for scheme in schemes:
                r = await MEASURES[scheme](url, chains, num_holders)
                largest = r if scheme == "bitmap" else largest
                print(
                    f"{r.scheme:8}{len(chains) * PROMPT_BLOCKS:12,}{r.holders:8}{r.bytes_per_block:13.0f}"
                    f"{r.publish_us:12.1f}{r.hit_us:20.0f}{r.miss_us:10.0f}",
                    flush=True,
                )
    if largest is not None:
        print(
            f"extrapolated, not measured: {EXTRAPOLATED_BLOCKS:,} blocks at {largest.bytes_per_block:.0f} bytes take "
            f"{EXTRAPOLATED_BLOCKS * largest.bytes_per_block / 2**30:.1f} GiB; a lookup is one hash table probe per "
            "block, whatever their number"
        )


MEASURES = {"bitmap": measure_bitmaps, "set": measure_sets}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[100_000], help=f"rounded down to multiples of {PROMPT_BLOCKS}"
    )
    parser.add_argument("--holders", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--schemes", nargs="+", choices=sorted(MEASURES), default=sorted(MEASURES))
    parser.add_argument("--redis-url", default="", help="default: a server of its own")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_arguments()
    configure_logging("directory_bench", "error")
    with tempfile.TemporaryDirectory() as directory_name, RedisServer(settings={"maxmemory": "4gb"}) as server:
        redis_url = arguments.redis_url or server.start(Path(directory_name))
        uvloop.run(main(redis_url, arguments.blocks, arguments.holders, arguments.schemes))
