"""Times the kernels around attention: per-token work, cache writes, block copies, checksum, sampling."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from kernels import triton as ops
from loadtest.gpu import oracles
from loadtest.gpu.limits import Limits
from loadtest.gpu.report import Row
from loadtest.gpu.timing import Stopwatch

_WIDTH, _INTERMEDIATE = 4096, 14336


def measure_rowwise(watch: Stopwatch, limits: Limits, *, small: bool) -> Iterator[Row]:
    """Yield normalisation and activation at decode and prefill sizes; the limit is that of copying."""
    for tokens in (3,) if small else (64, 8192):
        count = 2 if small else (16 if tokens == 64 else 4)
        weight = torch.randn(_WIDTH, device=watch.device).bfloat16()
        xs = torch.randn(count, tokens, _WIDTH, device=watch.device).bfloat16()
        residual = torch.randn_like(xs[0])
        ours = [functools.partial(ops.fused_add_rms_norm, x, residual, weight, 1e-5) for x in xs]
        theirs = [functools.partial(_torch_add_rms_norm, x, residual, weight) for x in xs]
        moved = 4.0 * tokens * _WIDTH * 2
        yield _bandwidth(watch, limits, f"fused_add_rms_norm, {tokens} x {_WIDTH}", ours, theirs, moved)
        gates = torch.randn(count, tokens, 2 * _INTERMEDIATE, device=watch.device).bfloat16()
        ours_gate = [functools.partial(ops.silu_and_mul, x) for x in gates]
        theirs_gate = [functools.partial(_torch_silu_and_mul, x) for x in gates]
        moved = 3.0 * tokens * _INTERMEDIATE * 2
        yield _bandwidth(watch, limits, f"silu_and_mul, {tokens} x {_INTERMEDIATE}", ours_gate, theirs_gate, moved)


def _bandwidth(
    watch: Stopwatch,
    limits: Limits,
    name: str,
    ours: Sequence[Callable[[], object]],
    theirs: Sequence[Callable[[], object]],
    moved: float,
) -> Row:
    """Rate against the copy limit, but only where the data is too much to stay in the L2 cache."""
    time_us, beside_us = watch.graph_microseconds(ours), watch.graph_microseconds(theirs)
    limit = limits.copy if moved > 100e6 else 0.0
    return Row("around attention", name, time_us, moved / time_us / 1e6, "TB/s", limit, "torch eager", beside_us)


def _torch_add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x + residual, (x.shape[-1],), weight, 1e-5)


def _torch_silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def measure_cache_write(watch: Stopwatch, limits: Limits, *, small: bool) -> Iterator[Row]:
    """Yield rotary + cache write in one kernel, beside the two ops one after the other."""
    for tokens in (3,) if small else (64, 8192):
        fused = torch.randn(tokens, 48, 128, device=watch.device).bfloat16()
        q, k, v = fused[:, :32], fused[:, 32:40], fused[:, 40:]
        arena = torch.zeros(-(-tokens // 16), 8, 2, 16, 8, 128, device=watch.device, dtype=torch.bfloat16)
        positions, slots = torch.arange(tokens, device=watch.device), torch.randperm(tokens, device=watch.device)
        table = oracles.angles(max(tokens, 16), 128, watch.device)
        inputs = (q, k, v, positions, table)
        time_us = watch.graph_microseconds(
            [functools.partial(ops.rotary_write_kv, *inputs, arena[:, layer], slots) for layer in range(8)]
        )
        two_us = watch.graph_microseconds(
            [functools.partial(_rotary_then_write, *inputs, arena[:, layer], slots) for layer in range(8)]
        )
        moved = tokens * 128 * 2.0 * (2 * 32 + 2 * 8 + 2 * 8)
        limit = limits.copy if moved > 100e6 else 0.0
        name = f"rotary_write_kv, {tokens} tokens, 32 + 8 heads of 128"
        rate = moved / time_us / 1e6
        yield Row("around attention", name, time_us, rate, "TB/s", limit, "rotary, then write_kv", two_us)


def _rotary_then_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    ops.rotary(q, k, positions, table)
    ops.write_kv(k, v, cache, slots)


def measure_blocks(watch: Stopwatch, limits: Limits, *, small: bool) -> Iterator[Row]:
    """Yield gather, scatter and checksum of scattered 2 MiB blocks: a request of 2,000 tokens has 125."""
    blocks, size = (4, 1 << 10) if small else (1024, 1 << 21)
    arena = torch.randint(0, 256, (blocks, size), dtype=torch.uint8, device=watch.device)
    ids = torch.randperm(blocks, device=watch.device)[: blocks // 2]
    staging = torch.empty(len(ids), size, dtype=torch.uint8, device=watch.device)
    moved = 2.0 * staging.numel()
    wide, wide_staging = arena.view(torch.int64), staging.view(torch.int64)
    pairs: list[tuple[str, Callable[[], object], str, Callable[[], object]]] = [
        ("gather_blocks", lambda: ops.gather_blocks(arena, ids, staging), "index_select of int64",
         lambda: torch.index_select(wide, 0, ids, out=wide_staging)),
        ("scatter_blocks", lambda: ops.scatter_blocks(arena, ids, staging), "index_copy_ of int64",
         lambda: wide.index_copy_(0, ids, wide_staging)),
    ]  # fmt: skip
    for name, ours, beside, theirs in pairs:
        time_us = watch.microseconds(ours)
        yield Row(
            "blocks", f"{name}, {len(ids)} x {size >> 10} KiB", time_us, moved / time_us / 1e6, "TB/s", limits.copy,
            beside, watch.microseconds(theirs),
        )  # fmt: skip
    time_us = watch.microseconds(lambda: ops.block_checksum(arena, ids))
    rate = staging.numel() / time_us / 1e6
    yield Row("blocks", f"block_checksum, {len(ids)} x {size >> 10} KiB", time_us, rate, "TB/s", limits.read)


def measure_sampling(watch: Stopwatch, *, small: bool) -> Iterator[Row]:
    """Yield one row per kind of sampling, 64 rows of Llama-3's vocabulary, beside torch with a full sort."""
    rows, vocabulary = (2, 500) if small else (64, 128256)
    logits = torch.randn(rows, vocabulary, device=watch.device).bfloat16() * 2
    keys, off = torch.arange(rows, device=watch.device), torch.zeros(rows, device=watch.device)
    heat, nucleus, fifty = off + 0.8, off + 0.9, (off + 50).int()
    draw = functools.partial(ops.sample, logits, keys=keys)
    whole = functools.partial(ops.draw, logits, keys=keys, tokens=torch.empty_like(keys))
    sort = "sort, cumsum, multinomial"
    kinds: list[tuple[str, Callable[[], object], str, Callable[[], object]]] = [
        ("greedy", lambda: whole(temperature=off), "argmax", lambda: logits.argmax(-1)),
        ("temperature", lambda: whole(temperature=heat), "softmax, multinomial",
         lambda: torch.multinomial((logits.float() / 0.8).softmax(-1), 1)),
        ("top-p 0.9", lambda: draw(temperature=heat, top_k=off.int(), top_p=nucleus, min_p=off), sort,
         lambda: _torch_top_p(logits)),
        ("top-k 50, top-p 0.9", lambda: draw(temperature=heat, top_k=fifty, top_p=nucleus, min_p=off), sort,
         lambda: _torch_top_p(logits)),
    ]  # fmt: skip
    for name, ours, beside, theirs in kinds:
        time_us, beside_us = watch.microseconds(ours), watch.microseconds(theirs)
        yield Row("sampling", f"{name}, {rows} x {vocabulary}", time_us, baseline=beside, baseline_us=beside_us)


def _torch_top_p(logits: torch.Tensor) -> torch.Tensor:
    ordered, order = (logits.float() / 0.8).softmax(-1).sort(dim=-1, descending=True)
    kept = ordered.masked_fill(ordered.cumsum(-1) - ordered > 0.9, 0.0)
    return order.gather(1, torch.multinomial(kept, 1))
