"""Times whole steps of a model against the bytes that they must read.

The floor of a decode step is its bytes over the rate of the large copy, as in the project's goals; pure reading is some
percent faster.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import torch

from loadtest.gpu.limits import Limits
from loadtest.gpu.random_llama import weight_bytes
from loadtest.gpu.report import Row
from shared.engine.device_runner import DeviceRunner
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence
from shared.engine.step import ScheduledSequence, StepBatch
from shared.identity import BlockHash, BlockId, SessionId
from shared.kv_arena import KvLayout
from shared.models.config import ModelConfig

_STEPS = 24


def make_sequences(num_sequences: int, context: int, growth: int, layout: KvLayout, num_blocks: int) -> list[Sequence]:
    """Sequences that have `context` tokens of KV each, in blocks of their own, and room for `growth` more."""
    each = -(-(context + growth) // layout.block_size)
    if num_sequences * each > num_blocks:
        raise ValueError(f"{num_sequences} x {each} blocks are wanted, there are {num_blocks}")
    order = torch.randperm(num_blocks).tolist()
    return [
        Sequence(
            session_id=SessionId("measure"),
            token_ids=[3] * (context + 1),
            num_prompt_tokens=context + 1,
            sampling=SamplingParams(max_tokens=1 << 20, temperature=1.0, seed=i),
            namespace=BlockHash(b""),
            block_table=[BlockId(b) for b in order[i * each : (i + 1) * each]],
            num_computed_tokens=context,
        )
        for i in range(num_sequences)
    ]


def time_decode(runner: DeviceRunner, sequences: list[Sequence], steps: int = _STEPS) -> float:
    """Seconds per decode step, two in flight as the engine runs them, host work included."""
    in_flight: deque[object] = deque()
    started_s = 0.0
    for step in range(steps + 4):
        if step == 4:
            started_s = time.perf_counter()
        batch = StepBatch([ScheduledSequence.next_of(one, 1) for one in sequences])
        in_flight.append(runner.launch(batch))
        for entry in batch.scheduled:
            entry.assume()
        if len(in_flight) == runner.max_in_flight:
            in_flight.popleft().result()  # type: ignore[attr-defined]
    while in_flight:
        in_flight.popleft().result()  # type: ignore[attr-defined]
    return (time.perf_counter() - started_s) / (steps + 1)


def measure_decode_steps(
    runner: DeviceRunner, config: ModelConfig, layout: KvLayout, num_blocks: int, limits: Limits, *, small: bool
) -> Iterator[Row]:
    """Yield one row per batch."""
    cases = [(2, 20, None)] if small else [(1, 128, 0.75), (1, 4096, None), (8, 1024, None), (64, 1024, 0.75),
                                           (64, 4096, None), (256, 512, None)]  # fmt: skip
    steps = 1 if small else _STEPS
    for num_sequences, context, goal in cases:
        sequences = make_sequences(num_sequences, context, steps + 8, layout, num_blocks)
        time_us = time_decode(runner, sequences, steps) * 1e6
        size = weight_bytes(config) + num_sequences * context * layout.token_bytes
        name = f"decode step, {num_sequences} x {context}: {size / 1e9:.1f} GB"
        yield Row("steps", name, time_us, size / time_us / 1e6, "TB/s", limits.copy, goal=goal)


def measure_prefill_steps(
    runner: DeviceRunner, config: ModelConfig, layout: KvLayout, num_blocks: int, limits: Limits, *, small: bool
) -> Iterator[Row]:
    """Yield one row per chunk; the rate counts the products with weights and the attention scores."""
    cases = [(17, 0)] if small else [(512, 0), (2048, 0), (8192, 0), (2048, 6144 - 64)]
    for chunk, context in cases:
        (one,) = make_sequences(1, context + chunk, 1, layout, num_blocks)
        one.num_computed_tokens = context
        del one.token_ids[context + chunk :]
        one.num_prompt_tokens = context + chunk
        times = []
        for _ in range(1 if small else 8):
            started_s = time.perf_counter()
            runner.launch(StepBatch([ScheduledSequence(one, context, chunk, True)])).result()
            times.append(time.perf_counter() - started_s)
        time_us = sorted(times)[len(times) // 2] * 1e6
        head = config.vocab_size * config.hidden_size
        products = 2 * chunk * (weight_bytes(config) // 2 - head)
        scores = 4 * config.num_layers * config.num_heads * config.head_dim * chunk * (context + chunk / 2)
        name = f"prefill step, {chunk} tokens after {context}: {chunk / time_us * 1e6:,.0f} tokens/s"
        yield Row("steps", name, time_us, (products + scores) / time_us / 1e6, "TFLOP/s", limits.matmul)
