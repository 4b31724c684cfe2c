"""Inter-token latency of a decode worker, alone and while its sidecar moves blocks into its cache as fast as it can.

    python -m loadtest.itl_under_transfer --streams 4 --tokens 300

Two decode workers. One computes some long prompts, which just fit into its cache; then the other streams, and meanwhile
is asked again and again for one token after each of those prompts. Beside its streams they don't fit, so its sidecar
fetches their KV every time. Rounds with and without transfer alternate. Each fetch ends in a step that computes up to
16 tokens, which is part of what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
import uuid
from typing import Any

from loadtest.bench import percentile
from loadtest.cluster import cluster
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from shared.identity import pack_tokens
from shared.rpc import open_channel

_PROMPTS = 13
_PROMPT_TOKENS = 2000
_CACHE_BYTES = 160 << 20  # of pydoc-mini in float32: 1706 blocks, the prompts have 1625


class Session:
    """One greedy generation on one worker, over a stream of its own.

    Attributes:
        arrivals_s: When each token came.
        fetched_bytes: For its prompt.
    """

    def __init__(self) -> None:
        self.arrivals_s: list[float] = []
        self.fetched_bytes = 0

    async def run(self, worker: dict[str, Any], prompt: list[int], max_tokens: int, **fields: Any) -> Session:
        """Until its end."""
        async with open_channel(worker["address"]) as channel:
            call = rpc.WorkerStub(channel).Generate()
            hello = pb.Hello(gateway_id="bench", incarnation=worker["incarnation"], fingerprint=worker["fingerprint"])
            await call.write(pb.GenerateCommand(hello=hello))
            await call.read()
            sampling = pb.SamplingParams(top_p=1, repetition_penalty=1, max_tokens=max_tokens, ignore_eos=True)
            submit = pb.Submit(
                session_id=uuid.uuid4().hex,
                num_choices=1,
                prompt_tokens=pack_tokens(prompt),
                sampling=sampling,
                **fields,
            )
            await call.write(pb.GenerateCommand(submit=submit))
            while isinstance(message := await call.read(), pb.StepOutput):
                self.arrivals_s += [time.perf_counter()] * len(message.token_ids)
                if message.failures:
                    raise RuntimeError(message.failures[0].message)
                if message.finishes:
                    self.fetched_bytes = message.finishes[0].timeline.fetched_bytes
                    break
            call.cancel()
        return self


def prompt_of(index: int) -> list[int]:
    """Token ids that no other index shares."""
    return [(37 * i + 101 * index) % 1500 + 300 for i in range(_PROMPT_TOKENS)]


_NOBODY = pb.PeerRef(worker_id="prefill-999", incarnation="0123456789abcdef")
"""Named as a prefill worker, so that the decode worker does not weigh computing the prompt itself against fetching."""


async def keep_fetching(worker: dict[str, Any], holder: pb.HolderHint, moved: list[int]) -> None:
    """One prompt after the other, until cancelled."""
    for index in itertools.cycle(range(_PROMPTS)):
        fields = {"cache_salt": "bench", "holders": [holder], "prefill_candidates": [_NOBODY]}
        session = await Session().run(worker, prompt_of(index), 1, **fields)
        moved.append(session.fetched_bytes)


async def stream(worker: dict[str, Any], count: int, tokens: int) -> list[float]:
    """Seconds between tokens of streams that run together."""
    prompts = [[(13 * i + 7 * n) % 1500 + 300 for i in range(64)] for n in range(count)]
    sessions = await asyncio.gather(*(Session().run(worker, p, tokens, cache_salt=uuid.uuid4().hex) for p in prompts))
    return [b - a for s in sessions for a, b in itertools.pairwise(s.arrivals_s)]


async def measure(workers: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Prints a line per kind of round."""
    source, worker = workers
    for index in range(_PROMPTS):
        await Session().run(source, prompt_of(index), 1, cache_salt="bench")
    holder = pb.PeerRef(worker_id=source["worker_id"], incarnation=source["transfer"]["incarnation"])
    hint = pb.HolderHint(holder=holder, num_blocks=_PROMPT_TOKENS // 16)
    quiet: list[float] = []
    loaded: list[float] = []
    moved: list[int] = []
    loaded_s = 0.0
    for _ in range(options.rounds):
        quiet += await stream(worker, options.streams, options.tokens)
        started_s = time.perf_counter()
        fetching = asyncio.create_task(keep_fetching(worker, hint, moved))
        loaded += await stream(worker, options.streams, options.tokens)
        loaded_s += time.perf_counter() - started_s
        fetching.cancel()
        await asyncio.gather(fetching, return_exceptions=True)
    print(f"{options.streams} streams of {options.tokens} tokens, {options.rounds} rounds each, milliseconds")
    for name, gaps in (("alone", quiet), ("under transfer", loaded)):
        p50, p99 = (1e3 * percentile(gaps, share) for share in (0.5, 0.99))
        print(f"{name:<16} ITL p50 {p50:7.2f}  p99 {p99:7.2f}")
    print(f"moved {sum(moved) / 1e6:.0f} MB in {loaded_s:.1f} s: {sum(moved) / loaded_s / 1e6:.0f} MB/s")


def main() -> None:
    """Brings the workers up, measures, takes them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    options, passed_on = parser.parse_known_args()
    arguments = ("--kv-cache-bytes", str(_CACHE_BYTES), "--tier-bytes", "0", *passed_on)
    with cluster(prefill=0, decode=2, options=arguments) as running:
        workers = running.status()["workers"]
        assert isinstance(workers, list)
        asyncio.run(measure(sorted(workers, key=lambda w: str(w["worker_id"])), options))


if __name__ == "__main__":
    main()
