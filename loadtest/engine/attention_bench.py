"""The native attention against its roofs: decode against reading the KV, prefill against the processor's dot products.

    python -m loadtest.engine.attention_bench --threads 2

Each row interleaves the kernel with its roof and gives the median of both; other work on the machine slows both.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable

import torch

from kernels.cpu.build import supported_isas
from kernels.cpu.decoder_step import batch_of
from kernels.cpu.library import KV_TYPES, Library
from kernels.cpu.packed_linear import native_linear
from kernels.quantization import Quantization
from kernels.reference.quantized_kv import SCALE_BYTES
from loadtest.engine.read_roof import read_roof_bytes_per_s

BLOCK = 16
DECODE = [(1, 4096), (8, 4096), (32, 1024)]
PREFILL = [(512, 512), (512, 4096)]


class Case:
    """`sequences` runs of `query_len` queries at the end of `length` tokens, over the layers of a cold cache."""

    def __init__(
        self, library: Library, shape: tuple[int, int, int], dtype: torch.dtype, runs: tuple[int, int, int], layers: int
    ) -> None:
        self._library, (self.heads, self.kv_heads, self.head_dim) = library, shape
        sequences, self.query_len, self.length = runs
        blocks = -(-self.length // BLOCK)
        width = self.head_dim + (SCALE_BYTES if dtype == torch.int8 else 0)
        arena = (sequences * blocks, layers, 2, BLOCK, self.kv_heads, width)
        if dtype == torch.int8:
            self._cache = torch.randint(-127, 128, arena, dtype=dtype)
            self._cache[..., -SCALE_BYTES:] = torch.tensor([0.01]).view(torch.int8)
        else:
            self._cache = torch.randn(arena).to(dtype)
        self.kv_bytes = self._cache.numel() * self._cache.element_size()
        self._kept = (
            torch.empty(sequences * self.query_len, dtype=torch.int64),
            torch.randperm(sequences * blocks, dtype=torch.int32).view(sequences, blocks),
            torch.arange(sequences + 1, dtype=torch.int32) * self.query_len,
            torch.full((sequences,), self.length, dtype=torch.int32),
        )
        empty, tables, starts, lengths = self._kept
        self._batch = batch_of(empty, empty, tables, starts, lengths)
        self._query = torch.randn(sequences * self.query_len, self.heads, self.head_dim)
        self._out = torch.empty_like(self._query)
        visible = self.length - (self.query_len - 1) / 2
        self.flops = layers * sequences * self.query_len * self.heads * visible * self.head_dim * 4

    def __call__(self) -> None:
        """All layers."""
        cache = self._cache
        for layer in range(cache.shape[1]):
            self._library.calls.tandem_paged_attention(
                self._library.team,
                KV_TYPES[cache.dtype],
                cache[:, layer].data_ptr(),
                cache.stride(0) * cache.element_size(),
                BLOCK,
                self.kv_heads,
                self.head_dim,
                ctypes.byref(self._batch),
                self._query.data_ptr(),
                self.heads,
                self.head_dim**-0.5,
                self._out.data_ptr(),
            )


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def dot_roof(library: Library, dtype: torch.dtype) -> Callable[[], float]:
    """Measures flops per second of a matrix product that stays in the cache, by the same instructions."""
    linear = native_linear(library, Quantization.NONE, torch.randn(256, 256).to(dtype), None)
    x = torch.randn(512, 256)
    return lambda: 2 * 512 * 256 * 256 / min(seconds(lambda: linear.multiply(x)) for _ in range(10))


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", type=int, nargs=3, default=(9, 3, 64), metavar=("HEADS", "KV_HEADS", "HEAD_DIM"))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    library = Library(supported_isas()[0], options.threads)
    print(f"{library.isa.name}, {options.threads} threads, heads {tuple(options.shape)}, {options.layers} layers")
    for sequences, length in DECODE:
        for dtype in KV_TYPES:
            case = Case(library, tuple(options.shape), dtype, (sequences, 1, length), options.layers)
            samples, roofs = [], []
            for _ in range(options.rounds):
                roofs.append(read_roof_bytes_per_s(options.threads))
                samples.append(case.kv_bytes / min(seconds(case) for _ in range(3)))
            print(
                f"decode {sequences:>2} x {length}, {str(dtype)[6:]:>8}: "
                f"{statistics.median(samples) / 1e9:6.1f} GB/s of KV,"
                f" {statistics.median(a / b for a, b in zip(samples, roofs, strict=True)):.2f} of the read roof"
            )
    for query_len, length in PREFILL:
        for dtype in KV_TYPES:
            roof = dot_roof(library, torch.float32 if dtype == torch.float32 else torch.bfloat16)
            case = Case(library, tuple(options.shape), dtype, (1, query_len, length), options.layers)
            samples, roofs = [], []
            for _ in range(options.rounds):
                roofs.append(roof())
                samples.append(case.flops / min(seconds(case) for _ in range(3)))
            print(
                f"prefill {query_len} of {length}, {str(dtype)[6:]:>8}: "
                f"{statistics.median(samples) / 1e9:6.0f} GFLOP/s,"
                f" {statistics.median(a / b for a, b in zip(samples, roofs, strict=True)):.2f} of the product's"
            )


if __name__ == "__main__":
    main()
