"""Times other ways to cut attention beside the one that serves, each checked against it first.

Whoever has a GPU next decides by these rows what `choose_tile` and `choose_plan` say.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch

from kernels.triton.decode_attention import DecodePlan, decode_attention
from kernels.triton.prefill_attention import PrefillTile, prefill_attention
from kernels.triton.prefill_tma_attention import TmaTile, prefill_tma_attention
from loadtest.gpu.limits import Limits
from loadtest.gpu.measure_attention import SCALE, Batch, enough_layers, make_batch
from loadtest.gpu.oracles import relative_error
from loadtest.gpu.report import Check, Row
from loadtest.gpu.timing import Stopwatch

_TOLERANCE = 6e-3
_TILES = [
    PrefillTile(64, 64, 4, 3, masked_stages=2),
    PrefillTile(64, 64, 4, 3, mask_all=True, masked_stages=3),
    PrefillTile(64, 64, 4, 4),
    PrefillTile(64, 128, 4, 2),
    PrefillTile(64, 128, 4, 3, masked_stages=2),
    PrefillTile(128, 64, 8, 3),
    PrefillTile(128, 64, 8, 4, masked_stages=2),
    PrefillTile(128, 128, 8, 2),
    PrefillTile(128, 128, 8, 3),
    PrefillTile(128, 128, 8, 3, masked_stages=2),
    PrefillTile(128, 128, 8, 3, mask_all=True, masked_stages=3),
]
_EVEN_TILES = [
    PrefillTile(64, 64, 4, 3, is_even=True),
    PrefillTile(64, 64, 4, 3, masked_stages=2, is_even=True),
    PrefillTile(128, 64, 8, 3, is_even=True),
    PrefillTile(128, 128, 8, 3, is_even=True),
]
_TMA_TILES = [
    TmaTile(),
    TmaTile(tokens=64, stages=3),
    TmaTile(tokens=64, stages=4),
    TmaTile(rows=64, tokens=64, warps=4, stages=3),
]

Timed = tuple[Check, Row]


def measure_prefill_variants(watch: Stopwatch, limits: Limits, *, small: bool) -> Iterator[Timed]:
    """Yield the goals that were missed, and one met beside them, under every tile."""
    cases = [(4, 2048, 16, 400.0), (1, 8192, 128, 500.0), (1, 32768, 128, 500.0), (1, 8192, 16, 400.0)]
    for seqs, chunk, page, goal in [(2, 20, 64, 0.0)] if small else cases:
        batch = make_batch(watch.device, [chunk] * seqs, chunk, page, 2)
        tiles: list[PrefillTile | TmaTile] = [*_TILES, *(_EVEN_TILES if seqs > 1 else [])]
        tiles += [tile for tile in _TMA_TILES if tile.tokens <= page]
        if small:
            tiles = [_TILES[0], _EVEN_TILES[0], TmaTile(rows=64, tokens=64)]
        yield from _compare(
            watch, batch, {_name(tile): functools.partial(_prefill, batch, tile) for tile in tiles},
            group=f"prefill attention, {seqs} x {chunk}, page {page}", work=batch.flops, unit="TFLOP/s",
            limit=limits.matmul, goal=goal, goal_kind="rate",
        )  # fmt: skip


def measure_decode_variants(watch: Stopwatch, limits: Limits, *, small: bool) -> Iterator[Timed]:
    """Yield the goal that was missed, 32 x 1024, and the fp8 cache, under several plans."""
    fp8, bf16 = torch.float8_e4m3fn, torch.bfloat16
    cases = [([1024] * 32, bf16, 0.75), ([4096] * 64, fp8, None), ([1024] * 64, fp8, None), ([4096], fp8, None)]
    for lens, cache, goal in [([70, 20], fp8, None)] if small else cases:
        kv_bytes = 2.0 * sum(lens) * 8 * 128 * cache.itemsize
        batch = make_batch(watch.device, lens, 1, 16, 2 if small else enough_layers(kv_bytes), cache)
        splits = [16, 32, 64] if len(lens) == 1 else [1, 2, 3, 4]
        tiles = [(32, 4), (64, 4), (128, 4)] if small or cache == fp8 else [(32, 4), (64, 4)]
        plans = [DecodePlan(*tile, stages, n) for tile, stages, n in itertools.product(tiles, (3, 4), splits)]
        if small:
            plans = plans[:2]
        kind = str(cache).removeprefix("torch.")
        yield from _compare(
            watch, batch, {_name(plan): functools.partial(_decode, batch, plan) for plan in plans},
            group=f"decode attention, {len(lens)} x {lens[0]}, {kind}", work=kv_bytes, unit="TB/s",
            limit=limits.read, goal=goal, goal_kind="share",
        )  # fmt: skip


Call = Callable[[int, torch.Tensor], None]


def _compare(
    watch: Stopwatch,
    batch: Batch,
    variants: dict[str, Call],
    *,
    group: str,
    work: float,
    unit: str,
    limit: float,
    goal: float | None,
    goal_kind: str,
) -> Iterator[Timed]:
    """Time each on all layers in one graph; a variant that does not compile or fit is a failed check, not the end."""
    expected = batch.call(0)
    serving_us = watch.graph_microseconds(batch.calls())
    yield (
        Check(f"{group}: as it serves", 0.0, 0.0),
        Row(group, "as it serves", serving_us, work / serving_us / 1e6, unit, limit, goal=goal, goal_kind=goal_kind),
    )
    for name, call in variants.items():
        out = torch.full_like(expected, float("nan"))
        try:
            call(0, out)
            error = relative_error(out, expected)
            calls = [functools.partial(call, layer, out) for layer in range(batch.num_layers)]
            time_us = watch.graph_microseconds(calls)
        except Exception as exc:  # a compiler's or driver's refusal of one variant
            print(f"{group}: {name}: {type(exc).__name__}: {str(exc)[:200]}", flush=True)
            error, time_us = float("inf"), 0.0
        rate = work / time_us / 1e6 if time_us else 0.0
        beside_us = serving_us if time_us else 0.0
        row = Row(group, name, time_us, rate, unit, limit, "as it serves", beside_us, goal, goal_kind)
        yield Check(f"{group}: {name}", error, _TOLERANCE), row


def _prefill(batch: Batch, tile: PrefillTile | TmaTile, layer: int, out: torch.Tensor) -> None:
    inputs = batch.inputs(layer)
    if isinstance(tile, TmaTile):
        prefill_tma_attention(*inputs, out, scale=SCALE, min_query_len=2, tile=tile)
    else:
        prefill_attention(*inputs, out, scale=SCALE, min_query_len=2, max_seq_len=batch.longest, tile=tile)


def _decode(batch: Batch, plan: DecodePlan, layer: int, out: torch.Tensor) -> None:
    decode_attention(
        *batch.inputs(layer), out, scale=SCALE, max_query_len=1, max_seq_len=batch.longest, plan=plan
    )  # fmt: skip


def _name(cut: PrefillTile | TmaTile | DecodePlan) -> str:
    if isinstance(cut, DecodePlan):
        return f"{cut.tokens} tokens, {cut.warps} warps, {cut.stages} stages, {cut.splits} splits"
    parts = [f"{cut.rows} x {cut.tokens}, {cut.warps} warps, {cut.stages} stages"]
    if isinstance(cut, TmaTile):
        parts.append("TMA")
    else:
        parts += [f"{cut.masked_stages} where masked"] if cut.masked_stages > 1 else []
        parts += ["one loop"] if cut.mask_all else []
        parts += ["longest rows of all first"] if cut.is_even else []
    return ", ".join(parts)
