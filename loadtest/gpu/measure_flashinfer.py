"""Times FlashInfer's paged attention beside ours, on the same inputs, in one process.

    python -m loadtest.gpu.measure_flashinfer --out loadtest/gpu/results

writes `<gpu>-flashinfer.json` and `.md`. Needs the GPU, nvcc and flashinfer-python (measured with 0.2.8, whose source
distribution carries all that its kernels are compiled from).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flashinfer  # type: ignore[import-not-found]
import torch

from loadtest.gpu.limits import measure_limits
from loadtest.gpu.measure_attention import Batch, enough_layers, make_batch
from loadtest.gpu.measure_kernels import hardware
from loadtest.gpu.oracles import relative_error
from loadtest.gpu.report import Check, Report, Row
from loadtest.gpu.timing import Stopwatch

_HEADS, _KV_HEADS, _DIM = 32, 8, 128
_TOLERANCE = 6e-3
_PREFILLS = [(1, 8192, 0, 16), (1, 8192, 0, 128), (4, 2048, 0, 16), (1, 2048, 14336, 16), (16, 512, 0, 16)]
"""Sequences, chunk, tokens before it, page."""
_DECODES = [(64, 4096), (32, 1024), (8, 4096), (1, 32768), (1, 4096)]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("loadtest/gpu/results"), help="folder of the results")
    options = parser.parse_args()
    torch.manual_seed(0)
    watch = Stopwatch("cuda")
    limits, rows = measure_limits(watch, small=False)
    checks: list[Check] = []

    def compare(group: str, name: str, batch: Batch, theirs: Any, work: float, unit: str, limit: float) -> None:
        caches = [batch.arena[:, layer].contiguous() for layer in range(batch.num_layers)]
        calls: list[Callable[[], object]] = [functools.partial(theirs.run, batch.query, cache) for cache in caches]
        checks.append(
            Check(f"{group}, {name}", relative_error(theirs.run(batch.query, caches[0]), batch.call(0)), _TOLERANCE)
        )
        ours_us, theirs_us = watch.graph_microseconds(batch.calls()), watch.graph_microseconds(calls)
        rows.append(Row(group, name, ours_us, work / ours_us / 1e6, unit, limit, "FlashInfer", theirs_us))
        print(f"{group}, {name}: ours {ours_us:.1f} us, FlashInfer {theirs_us:.1f} us", flush=True)

    for seqs, chunk, context, page in _PREFILLS:
        batch = make_batch("cuda", [chunk + context] * seqs, chunk, page, 2)
        for backend in ("fa3", "fa2"):
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend=backend)
            wrapper.plan(
                batch.starts, *_pages(batch, page), _HEADS, _KV_HEADS, _DIM, page, causal=True,
                q_data_type=torch.bfloat16,
            )  # fmt: skip
            name = f"{seqs} x {chunk} tokens after {context}, page {page}, FlashInfer's {backend}"
            compare("prefill attention", name, batch, wrapper, batch.flops, "TFLOP/s", limits.matmul)
    for seqs, length in _DECODES:
        kv_bytes = 2.0 * seqs * length * _KV_HEADS * _DIM * 2
        batch = make_batch("cuda", [length] * seqs, 1, 16, enough_layers(kv_bytes))
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(), "NHD", use_tensor_cores=True)
        wrapper.plan(*_pages(batch, 16), _HEADS, _KV_HEADS, _DIM, 16, q_data_type=torch.bfloat16)
        compare("decode attention", f"{seqs} x {length}, page 16", batch, wrapper, kv_bytes, "TB/s", limits.read)
    found = hardware("cuda") | {"FlashInfer": str(flashinfer.__version__)}
    report = Report(
        found, checks, rows, title="Attention beside FlashInfer, measured", script="measure_flashinfer", oracle="ours"
    )
    report.write(
        options.out, torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-") + "-flashinfer"
    )


def _workspace() -> torch.Tensor:
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")


def _pages(batch: Batch, page: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashInfer's block table: int32 starts `[S + 1]`, page numbers in a row, tokens in each sequence's last page."""
    counts = -(-batch.lens // page)
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
    numbers = torch.cat([row[:count] for row, count in zip(batch.tables, counts.tolist(), strict=True)])
    return starts, numbers, (batch.lens - 1) % page + 1


if __name__ == "__main__":
    main()
