"""A thousand requests as people send them, through the engine in this process, all there at once."""

from __future__ import annotations

import queue
import random
import time
from dataclasses import dataclass

from loadtest.gpu.report import Row
from shared.engine.block_pool import BlockPool
from shared.engine.config import EngineConfig
from shared.engine.engine import Engine
from shared.engine.pipeline import PipelinedRunner
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence
from shared.engine.step import StepOutputs
from shared.identity import Fingerprint, SessionId, namespace_hash

LIMIT_TOKENS_PER_S = 17_000
"""Output tokens per second that an H200 could reach with these lengths: reading weights and KV, prompts at the rate of
its matrix units (the sums are in the repository's measurements)."""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """Exactly `output_tokens` are generated."""

    prompt: list[int]
    output_tokens: int


def draw_requests(vocab_size: int, count: int, *, longest: int = 1024, seed: int = 0) -> list[TokenRequest]:
    """Log-normal lengths, none above `longest`, with the means of ShareGPT's first turns: 215 in and 197 out."""
    rng = random.Random(seed)

    def length(mean: float) -> int:
        sigma = 0.75
        drawn = rng.lognormvariate(0, sigma) * mean / 2.718281828 ** (sigma**2 / 2)
        return min(longest, max(4, round(drawn)))

    return [TokenRequest([rng.randrange(3, vocab_size) for _ in range(length(215))], length(197)) for _ in range(count)]


def measure_requests(
    runner: PipelinedRunner, requests: list[TokenRequest], num_blocks: int, config: EngineConfig
) -> tuple[Row, dict[str, float]]:
    """Runs all requests; the row, and what the engine counted."""
    messages: queue.SimpleQueue[StepOutputs] = queue.SimpleQueue()
    engine = Engine(runner, BlockPool(num_blocks, config.block_size), config, messages.put)
    sequences = [
        Sequence(
            session_id=SessionId(str(i)),
            token_ids=list(request.prompt),
            num_prompt_tokens=len(request.prompt),
            sampling=SamplingParams(max_tokens=request.output_tokens, ignore_eos=True, temperature=1.0, seed=i),
            namespace=namespace_hash(Fingerprint("measure")),
        )
        for i, request in enumerate(requests)
    ]
    started_s = time.perf_counter()
    engine.submit(sequences)
    engine.start()
    num_tokens = num_finished = 0
    while num_finished < len(sequences):
        outputs = messages.get(timeout=300)
        num_tokens += len(outputs.tokens)
        num_finished += len(outputs.finished)
    elapsed_s = time.perf_counter() - started_s
    engine.stop()
    stats = engine.stats()
    if stats.failure or num_tokens != sum(request.output_tokens for request in requests):
        raise RuntimeError(f"{num_tokens} tokens came; {stats.failure or 'the engine did not fail'}")
    mean_in = sum(len(r.prompt) for r in requests) / len(requests)
    mean_out = num_tokens / len(requests)
    counts = {
        "seconds": elapsed_s,
        "steps": stats.steps,
        "preemptions": stats.preemptions,
        "prompt_tokens_per_s": mean_in * len(requests) / elapsed_s,
        "output_tokens_per_s": num_tokens / elapsed_s,
    }
    name = f"{len(requests)} requests, mean {mean_in:.0f} in, {mean_out:.0f} out, up to {config.max_sequences} at once"
    row = Row(
        "requests", name, elapsed_s * 1e6, num_tokens / elapsed_s, "output tokens/s", LIMIT_TOKENS_PER_S, goal=0.65
    )
    return row, counts
