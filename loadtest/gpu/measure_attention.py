"""Times attention in the shape of Llama-3-8B (32 query heads, 8 KV heads of 128) and beside torch's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import triton as ops
from loadtest.gpu.limits import Limits
from loadtest.gpu.report import Row
from loadtest.gpu.timing import Stopwatch

_HEADS, _KV_HEADS, _DIM = 32, 8, 128
SCALE = _DIM**-0.5


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch over an arena of several layers; one call per layer keeps the cache cold."""

    arena: torch.Tensor
    tables: torch.Tensor
    query: torch.Tensor
    starts: torch.Tensor
    lens: torch.Tensor
    query_len: int
    longest: int

    def call(self, layer: int) -> torch.Tensor:
        """The attention op."""
        return ops.paged_attention(
            *self.inputs(layer), scale=SCALE, max_query_len=self.query_len, max_seq_len=self.longest,
        )  # fmt: skip

    @property
    def num_layers(self) -> int:
        """Of the arena."""
        return int(self.arena.shape[1])

    def inputs(self, layer: int) -> tuple[torch.Tensor, ...]:
        """The positional arguments of attention, but for its output."""
        return self.query, self.arena[:, layer], self.tables, self.starts, self.lens

    @property
    def kv_bytes(self) -> float:
        """Of one layer, all sequences."""
        return 2.0 * int(self.lens.sum()) * _KV_HEADS * _DIM * self.arena.element_size()

    @property
    def flops(self) -> float:
        """Of one layer's causal scores and sums, all chunks of one length."""
        context, seqs = self.longest - self.query_len, len(self.lens)
        return 4.0 * _HEADS * _DIM * seqs * (self.query_len * context + self.query_len * (self.query_len + 1) / 2)

    def calls(self) -> list[Callable[[], object]]:
        """`call` for each layer."""
        return [functools.partial(self.call, layer) for layer in range(self.arena.shape[1])]


def make_batch(
    device: str, lens: list[int], query_len: int, page: int, layers: int, cache: torch.dtype = torch.bfloat16
) -> Batch:
    """Random inputs over scattered blocks: `query_len` tokens at the end of each of `lens`."""
    needed = [-(-n // page) for n in lens]
    ids = torch.randperm(sum(needed), device=device).int()
    tables = torch.zeros(len(lens), max(needed), dtype=torch.int32, device=device)
    used = 0
    for row, count in enumerate(needed):
        tables[row, :count] = ids[used : used + count]
        used += count
    arena = torch.randn(sum(needed), layers, 2, page, _KV_HEADS, _DIM, device=device, dtype=torch.bfloat16).to(cache)
    return Batch(
        arena=arena,
        tables=tables,
        query=torch.randn(len(lens) * query_len, _HEADS, _DIM, device=device).bfloat16(),
        starts=torch.arange(len(lens) + 1, device=device, dtype=torch.int32) * query_len,
        lens=torch.tensor(lens, dtype=torch.int32, device=device),
        query_len=query_len,
        longest=max(lens),
    )


def enough_layers(kv_bytes: float) -> int:
    """As many layers as make 1.5 GB, 3 to 24: far more than the L2 keeps, and one graph's launch is shared by many."""
    return max(3, min(24, int(1.5e9 / kv_bytes)))


@dataclass(frozen=True, slots=True)
class _Decode:
    lens: list[int]
    page: int
    goal: float | None
    goal_kind: str = "share"
    cache: torch.dtype = torch.bfloat16
    label: str = ""


def _decode_cases(small: bool) -> list[_Decode]:
    if small:
        return [_Decode([20, 33], 16, None)]
    ragged = torch.linspace(5.0, 9.0, 64).exp().int().tolist()
    return [
        _Decode([4096] * 64, 16, 0.85),
        _Decode([4096] * 64, 128, 0.85),
        _Decode([1024] * 256, 16, 0.85),
        _Decode([1024] * 64, 16, None),
        _Decode([1024] * 32, 16, 0.75),
        _Decode([4096] * 8, 16, 0.75),
        _Decode([32768], 16, 0.75),
        _Decode([4096], 16, 12.0, "time"),
        _Decode(ragged, 16, None, label="64 ragged, 148 to 8103"),
        _Decode([4096] * 64, 16, None, cache=torch.float8_e4m3fn, label="64 x 4096, fp8 cache"),
    ]


def measure_decode(watch: Stopwatch, limits: Limits, *, small: bool) -> Iterator[Row]:
    """Yield one row per decode batch; the rate counts each K and V byte once."""
    for case in _decode_cases(small):
        kv_bytes = 2.0 * sum(case.lens) * _KV_HEADS * _DIM * case.cache.itemsize
        batch = make_batch(watch.device, case.lens, 1, case.page, 2 if small else enough_layers(kv_bytes), case.cache)
        time_us = watch.graph_microseconds(batch.calls())
        name = (case.label or f"{len(case.lens)} x {case.lens[0]}") + f", page {case.page}, {kv_bytes / 1e6:.0f} MB"
        beside_us = 0.0
        if not case.label and case.page == 16:
            beside_us = _torch_decode(watch, len(case.lens), case.lens[0], batch.arena.shape[1])
        yield Row(
            "decode attention", name, time_us, kv_bytes / time_us / 1e6, "TB/s", limits.read,
            "torch SDPA, unpaged" if beside_us else "", beside_us, case.goal, case.goal_kind,
        )  # fmt: skip


def _torch_decode(watch: Stopwatch, seqs: int, length: int, layers: int) -> float:
    """Time torch's attention over contiguous K and V of equal lengths: no paging to do."""
    query = torch.randn(seqs, _HEADS, 1, _DIM, device=watch.device).bfloat16()
    shape = (layers, 2, seqs, _KV_HEADS, length, _DIM)
    kv = torch.randn(shape, device=watch.device, dtype=torch.bfloat16)

    def call(layer: int) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, kv[layer, 0], kv[layer, 1], enable_gqa=True)

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        return watch.graph_microseconds([functools.partial(call, layer) for layer in range(layers)])


def measure_prefill(watch: Stopwatch, limits: Limits, *, small: bool) -> Iterator[Row]:
    """Yield one row per batch of chunks: (sequences, chunk, context before it, page, goal in TFLOP/s)."""
    cases = [
        (1, 8192, 0, 16, 400), (1, 8192, 0, 128, 500), (1, 2048, 14336, 16, 400), (4, 2048, 0, 16, 400),
        (1, 32768, 0, 128, 500),
    ]  # fmt: skip
    for seqs, chunk, context, page, goal in [(1, 9, 10, 16, 0)] if small else cases:
        batch = make_batch(watch.device, [chunk + context] * seqs, chunk, page, 2)
        flops = 4.0 * _HEADS * _DIM * seqs * (chunk * context + chunk * (chunk + 1) / 2)
        time_us = watch.graph_microseconds(batch.calls())
        beside, beside_us = _torch_prefill(watch, seqs, chunk) if context == 0 else ("", 0.0)
        name = f"{seqs} x {chunk} tokens after {context}, page {page}"
        yield Row(
            "prefill attention", name, time_us, flops / time_us / 1e6, "TFLOP/s", limits.matmul, beside, beside_us,
            goal, "rate",
        )  # fmt: skip


def _torch_prefill(watch: Stopwatch, seqs: int, chunk: int) -> tuple[str, float]:
    """Return the name and time of the faster of torch's causal attentions over contiguous K and V."""
    query = torch.randn(seqs, _HEADS, chunk, _DIM, device=watch.device).bfloat16()
    keys, values = torch.randn(2, seqs, _KV_HEADS, chunk, _DIM, device=watch.device).bfloat16()

    def call() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)

    if watch.device == "cpu":
        return "torch SDPA", watch.microseconds(call)
    times = {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(backend):
            times[f"torch SDPA {name}, unpaged"] = watch.microseconds(call)
    return min(times.items(), key=lambda item: item[1])
