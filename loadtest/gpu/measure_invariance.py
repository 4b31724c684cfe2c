"""What batch invariance costs on the device: attention and products beside the usual ones; and that bits are equal."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from kernels.triton import invariant, invariant_attention
from kernels.triton.invariant_linear import invariant_matmul
from kernels.triton.linear import step_linear
from loadtest.gpu.limits import Limits
from loadtest.gpu.measure_attention import SCALE, Batch, enough_layers, make_batch
from loadtest.gpu.oracles import relative_error
from loadtest.gpu.report import Check, Row
from loadtest.gpu.timing import Stopwatch

_PRODUCTS = {"qkv": (6144, 4096), "output": (4096, 4096), "gate and up": (28672, 4096), "down": (4096, 14336)}
"""Of Llama-3-8B: outputs, inputs."""


def check_bits(device: str, *, small: bool) -> Iterator[Check]:
    """Yield the share of rows whose bits differ between a row alone and among others; must be none."""
    for name, (outputs, inputs) in {"small": (72, 96)}.items() if small else _PRODUCTS.items():
        x, weight = torch.randn(150, inputs, device=device).bfloat16(), torch.randn(outputs, inputs, device=device)
        weight = weight.bfloat16()
        together = invariant_matmul(x, weight, None)
        rows = [0, 63, 64, 149]
        differ = sum(not torch.equal(invariant_matmul(x[r : r + 1], weight, None)[0], together[r]) for r in rows)
        yield Check(f"bits, product {name}", differ / len(rows), 0.0)
        halves = torch.cat([invariant_matmul(part, weight, None, whole=True) for part in x.split(64)])
        yield Check(f"bits, product {name}, whole in parts", float(not torch.equal(halves, together)), 0.0)
    for cache in (torch.bfloat16, torch.float8_e4m3fn):
        lens = [37, 20] if small else [5000, 700, 1300]
        chunk = 5 if small else 600
        batch = make_batch(device, lens, chunk, 16, 1, cache)
        together = _invariant(batch, 0)
        differ = 0
        for s, length in enumerate(lens):  # the last token of each chunk as a decode step of its own
            alone = invariant.paged_attention(
                batch.query[(s + 1) * chunk - 1 :][:1], batch.arena[:, 0], batch.tables[s : s + 1],
                batch.starts[:2] // chunk, batch.lens[s : s + 1], scale=SCALE, max_query_len=1, max_seq_len=length,
            )  # fmt: skip
            differ += not torch.equal(alone[0], together[(s + 1) * chunk - 1])
        kind = str(cache).removeprefix("torch.")
        yield Check(f"bits, attention over {kind}, decode beside chunk", differ / len(lens), 0.0)
        yield Check(f"invariant attention over {kind}", relative_error(together, batch.call(0)), 6e-3)


def _invariant(batch: Batch, layer: int) -> torch.Tensor:
    return invariant.paged_attention(
        *batch.inputs(layer), scale=SCALE, max_query_len=batch.query_len, max_seq_len=batch.longest
    )


def measure_invariant_attention(watch: Stopwatch, limits: Limits, *, small: bool) -> Iterator[Row]:
    """Yield decode batches and chunks, beside the usual kernels; decode also with other lengths of a run."""
    group = "invariant attention"
    for lens in [[20, 33]] if small else [[4096], [4096] * 8, [1024] * 32, [4096] * 32, [4096] * 64]:
        batch = make_batch(watch.device, lens, 1, 16, 2 if small else enough_layers(2.0 * sum(lens) * 8 * 128 * 2))
        usual_us = watch.graph_microseconds(batch.calls())
        for run in (512,) if small else (256, 512, 1024):
            served, invariant_attention.RUN_TOKENS = invariant_attention.RUN_TOKENS, run
            time_us = watch.graph_microseconds(
                [functools.partial(_invariant, batch, i) for i in range(batch.num_layers)]
            )
            invariant_attention.RUN_TOKENS = served
            name = f"{len(lens)} x {lens[0]}, runs of {run}"
            yield Row(group, name, time_us, batch.kv_bytes / time_us / 1e6, "TB/s", limits.read, "usual", usual_us)
    for seqs, chunk, context in [(1, 9, 10)] if small else [(1, 8192, 0), (4, 2048, 0), (1, 2048, 14336)]:
        batch = make_batch(watch.device, [chunk + context] * seqs, chunk, 16, 2)
        usual_us = watch.graph_microseconds(batch.calls())
        time_us = watch.graph_microseconds([functools.partial(_invariant, batch, i) for i in range(2)])
        name = f"{seqs} x {chunk} after {context}"
        yield Row(group, name, time_us, batch.flops / time_us / 1e6, "TFLOP/s", limits.matmul, "usual", usual_us)


def measure_invariant_products(watch: Stopwatch, limits: Limits, *, small: bool) -> Iterator[Row]:
    """Yield Llama-3-8B's products at several numbers of rows, beside the kernels that serve otherwise."""
    group = "invariant products"
    for name, (outputs, inputs) in {"small": (72, 96)}.items() if small else _PRODUCTS.items():
        copies = 2 if small else max(2, int(1.5e8 / (outputs * inputs * 2)) + 1)  # more than the L2 cache keeps
        weights = [torch.randn(outputs, inputs, device=watch.device).bfloat16() for _ in range(copies)]
        for rows in (1,) if small else (1, 8, 64, 256, 2048):
            x = torch.randn(rows, inputs, device=watch.device).bfloat16()
            usual_us = watch.graph_microseconds([functools.partial(step_linear(w, None), x) for w in weights])
            time_us = watch.graph_microseconds([functools.partial(invariant_matmul, x, w, None) for w in weights])
            is_read = rows <= 64
            work = 2.0 * outputs * inputs if is_read else 2.0 * outputs * inputs * rows
            yield Row(
                group, f"{name} {outputs} x {inputs}, {rows} rows", time_us, work / time_us / 1e6,
                "TB/s" if is_read else "TFLOP/s", limits.read if is_read else limits.matmul, "usual", usual_us,
            )  # fmt: skip
