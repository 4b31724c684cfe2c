"""The batched sampler: penalties, temperature, top-k, top-p, min-p and the draw, with nothing on the host.

One program per row. A draw is the Gumbel-max trick (Maddison et al. 2014) with the counter-based noise of `noise`, so
whoever computes the same logits draws the same token. Top-k and top-p need no sort: an eight-way search over the
order-preserving integer image of the logits finds the cut. `draw` is faster where nothing is cut.
"""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.triton.noise import gumbel_noise
from kernels.triton.target import Target, current_target

_WIDE = 2048
"""Values a pass takes at a time where it does little with each."""
_LIMIT = 4096
"""Values that the search for a cut copies out, at most."""


@dataclass(frozen=True, slots=True)
class Penalties:
    """What was said so far and how much it counts; all on the logits' device.

    Attributes:
        output_counts: int32 `[S, V]`, how often each token was generated.
        prompt_mask: uint8 `[S, V]`, 1 where the prompt holds the token.
        repetition: fp32 `[S]`, divides positive and multiplies negative logits of tokens seen anywhere; 1 is off.
        presence: fp32 `[S]`, subtracted once from generated tokens; 0 is off.
        frequency: fp32 `[S]`, subtracted per occurrence from generated tokens; 0 is off.
    """

    output_counts: torch.Tensor
    prompt_mask: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor


@triton.jit
def _order_key(x):
    """Map fp32 to int32 so that `a < b` iff `key(a) < key(b)`."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _weigh(values, n, row_max, pivots, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Return, per pivot, how many of `values[0 .. n)` have a key at or above it, and what they weigh (two fp32 `[8]`).

    A value weighs `exp(value - row_max)` with BY_MASS, else 1. The padding of the last tile counts as -inf.
    """
    bounds = pivots.to(tl.int32)[None, :]
    mass = tl.zeros([BLOCK, 8], tl.float32)
    count = tl.zeros([BLOCK, 8], tl.float32)
    for start in tl.range(0, n, BLOCK, num_stages=3):
        c = start + tl.arange(0, BLOCK)
        x = tl.load(values + c, mask=c < n, other=float("-inf"))
        take = _order_key(x)[:, None] >= bounds
        count += tl.where(take, 1.0, 0.0)
        if BY_MASS:
            mass += tl.where(take, tl.exp(x - row_max)[:, None], 0.0)
    counts = tl.sum(count, 0)
    return counts, tl.sum(mass, 0) if BY_MASS else counts


@triton.jit
def _narrow(hi, above, weight_above, pivots, counts, weights, target):
    """Return the pivots that enclose the cut, count and weight at or above the upper one, and the count between."""
    lane = tl.arange(0, 8)
    best = tl.max(tl.where(weights >= target, lane, 0), 0)
    at_best = tl.sum(tl.where(lane == best, counts, 0.0), 0)
    new_lo = tl.sum(tl.where(lane == best, pivots, 0), 0)
    next_pivot = tl.sum(tl.where(lane == best + 1, pivots, 0), 0)
    at_next = tl.sum(tl.where(lane == best + 1, counts, 0.0), 0)
    new_hi = tl.where(best < 7, tl.minimum(hi, next_pivot), hi)
    new_above = tl.where(best < 7, at_next, above)
    weight_at_next = tl.sum(tl.where(lane == best + 1, weights, 0.0), 0)
    new_weight_above = tl.where(best < 7, weight_at_next, weight_above)
    return new_lo, new_hi, new_above, new_weight_above, at_best - new_above


@triton.jit
def _collect(row, V, lo, hi, found, BLOCK: tl.constexpr):
    """Copy the values with keys in `[lo, hi)` to the front of `found`, in order; return how many."""
    base = 0
    for start in tl.range(0, V, BLOCK, num_stages=3):
        c = start + tl.arange(0, BLOCK)
        x = tl.load(row + c, mask=c < V, other=float("-inf"))
        key = _order_key(x)
        take = (key >= lo) & (key < hi) & (c < V)
        tl.store(found + base + tl.cumsum(take.to(tl.int32), 0) - 1, x, mask=take)
        base += tl.sum(take.to(tl.int32), 0)
    tl.debug_barrier()  # other threads read the list than wrote it
    return base


@triton.jit
def _cut(
    row,
    found,  # fp32 [LIMIT], scratch
    V,
    row_max,
    floor,
    target,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Return the largest key `t >= floor` such that the values of key `>= t` weigh at least `target`.

    The first pivots lie 1, 2, 4 .. 64 below the maximum, the later ones evenly between the two that enclose the cut.
    Once at most LIMIT values lie between, they are copied out and the search goes on among them; it ends with one.
    """
    lane = tl.arange(0, 8)
    far = _order_key(row_max - tl.exp2((7 - lane).to(tl.float32))).to(tl.int64)
    pivots = tl.where(lane == 0, floor, tl.maximum(far, floor))
    counts, weights = _weigh(row, V, row_max, pivots, BY_MASS, BLOCK)
    top = _order_key(row_max).to(tl.int64) + 1
    lo, hi, above, weight_above, between = _narrow(top, 0.0, 0.0, pivots, counts, weights, target)
    while (hi - lo > 1) & (between > LIMIT):
        pivots = lo + tl.maximum((hi - lo) // 8, 1) * lane
        counts, weights = _weigh(row, V, row_max, pivots, BY_MASS, BLOCK)
        lo, hi, above, weight_above, between = _narrow(hi, above, weight_above, pivots, counts, weights, target)
    if (hi - lo > 1) & (between > 1):
        n = _collect(row, V, lo, hi, found, WIDE)
        outside, weight_outside = above, weight_above
        while (hi - lo > 1) & (between > 1):
            pivots = lo + tl.maximum((hi - lo) // 8, 1) * lane
            counts, weights = _weigh(found, n, row_max, pivots, BY_MASS, BLOCK)
            lo, hi, above, weight_above, between = _narrow(
                hi, above, weight_above, pivots, counts + outside, weights + weight_outside, target
            )
    return lo


@triton.jit
def _mass_from(row, V, row_max, floor, BLOCK: tl.constexpr):
    """Return the summed `exp(x - row_max)` of the values of key `>= floor`."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=3):
        c = start + tl.arange(0, BLOCK)
        x = tl.load(row + c, mask=c < V, other=float("-inf"))
        total += tl.where(_order_key(x) >= floor, tl.exp(x - row_max), 0.0)
    return tl.sum(total, 0)


def _pivot_block(target: Target) -> int:
    """Return the values that a pass holds against eight pivots at a time.

    On Blackwell 1,024 spill registers (Triton 3.7.1), with fewer warps too; 512 leave as many programs resident.
    """
    return 512 if target.arch >= 100 else 1024


@triton.jit
def sample_kernel(
    logits,  # [S, V]
    scratch,  # fp32 [S, V], penalised logits / temperature
    candidates,  # fp32 [S, LIMIT]
    temperature,  # fp32 [S]
    top_k,  # int32 [S]
    top_p,  # fp32 [S]
    min_p,  # fp32 [S]
    keys,  # int64 [S]
    output_counts,  # int32 [S, V]
    prompt_mask,  # uint8 [S, V]
    repetition,  # fp32 [S]
    presence,  # fp32 [S]
    frequency,  # fp32 [S]
    tokens,  # int64 [S], written
    logprobs,  # fp32 [S], written
    logits_stride,
    V,
    FILTER: tl.constexpr,
    PENALISE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Grid (row)."""
    s = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + s)
    greedy = heat <= 0.0
    divisor = tl.where(greedy, 1.0, heat)
    row = scratch + s * V
    found = candidates + s * LIMIT

    raw_max = tl.full([WIDE], float("-inf"), tl.float32)
    raw_sum = tl.zeros([WIDE], tl.float32)
    top = tl.full([WIDE], float("-inf"), tl.float32)
    for start in tl.range(0, V, WIDE, num_stages=3):
        c = start + tl.arange(0, WIDE)
        x = tl.load(logits + s * logits_stride + c, mask=c < V, other=float("-inf")).to(tl.float32)
        new_max = tl.maximum(raw_max, x)
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        raw_sum = raw_sum * tl.exp(raw_max - base) + tl.exp(x - base)
        raw_max = new_max
        if PENALISE:
            count = tl.load(output_counts + s * V + c, mask=c < V, other=0)
            seen = (count > 0) | (tl.load(prompt_mask + s * V + c, mask=c < V, other=0) > 0)
            factor = tl.load(repetition + s)
            x = tl.where(seen, tl.where(x > 0, x / factor, x * factor), x)
            x = x - tl.load(frequency + s) * count - tl.where(count > 0, tl.load(presence + s), 0.0)
        x = x / divisor
        tl.store(row + c, x, mask=c < V)
        top = tl.maximum(top, x)
    tl.debug_barrier()  # the row is read back by other threads than wrote it
    row_max = tl.max(top, 0)
    peak = tl.max(raw_max, 0)
    normaliser = peak + tl.log(tl.sum(raw_sum * tl.exp(tl.where(raw_max == peak, 0.0, raw_max - peak)), 0))

    cut = tl.sum(_order_key(tl.full([1], float("-inf"), tl.float32)), 0).to(tl.int64)
    if FILTER:  # noqa: SIM102 - the compiler decides this one, the device the next
        if not greedy:
            k = tl.load(top_k + s)
            if (k > 0) & (k < V):
                cut = _cut(row, found, V, row_max, cut, k.to(tl.float32), False, BLOCK, WIDE, LIMIT)
            p = tl.load(top_p + s)
            if p < 1.0:
                target = p * _mass_from(row, V, row_max, cut, WIDE)
                cut = _cut(row, found, V, row_max, cut, target, True, BLOCK, WIDE, LIMIT)
            smallest = tl.load(min_p + s)
            if smallest > 0.0:
                cut = tl.maximum(cut, _order_key(row_max + tl.log(smallest)).to(tl.int64))

    key = tl.load(keys + s)
    best = tl.full([WIDE], float("-inf"), tl.float32)
    where = tl.zeros([WIDE], tl.int32)
    for start in tl.range(0, V, WIDE, num_stages=3):
        c = start + tl.arange(0, WIDE)
        x = tl.load(row + c, mask=c < V, other=float("-inf"))
        score = x
        if not greedy:
            score = x + gumbel_noise(key, c)
            score = tl.where(_order_key(x) >= cut, score, float("-inf"))
        where = tl.where(score > best, c, where)
        best = tl.maximum(best, score)
    winner = tl.max(best, 0)
    token = tl.min(tl.where(best == winner, where, V), 0)
    tl.store(tokens + s, token.to(tl.int64))
    chosen = tl.load(logits + s * logits_stride + token).to(tl.float32)
    tl.store(logprobs + s, chosen - normaliser)


def sample(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    keys: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    penalties: Penalties | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row.

    Penalties come first, then temperature, top-k, top-p over what top-k left, min-p relative to the largest
    probability, and the draw. Tokens that tie with the last one kept are kept. The three filters are given together or
    left out together; leaving them out saves the launch their registers.

    Args:
        logits: `[S, V]`, any float dtype, last dimension contiguous; -inf forbids a token. Not modified.
        temperature: fp32 `[S]`; 0 takes the largest logit, lowest id first.
        keys: int64 `[S]`, of the noise: a scramble of seed, choice and the position of the token to be drawn.
        top_k: int32 `[S]`; 0 is off.
        top_p: fp32 `[S]`; 1 is off.
        min_p: fp32 `[S]`; 0 is off.
        penalties: None is off.

    Returns:
        Token ids, int64 `[S]`, and the log-probability of each under the unmodified logits, fp32 `[S]`.
    """
    num_rows, vocabulary = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows == 0:
        return tokens, logprobs
    scratch = torch.empty((num_rows, vocabulary), dtype=torch.float32, device=logits.device)
    candidates = torch.empty((num_rows, _LIMIT), dtype=torch.float32, device=logits.device)
    filters = (top_k, top_p, min_p)
    filtered = all(f is not None for f in filters)
    if not filtered and any(f is not None for f in filters):
        raise ValueError("top_k, top_p and min_p are given together or not at all")
    said = penalties or Penalties(tokens, tokens, temperature, temperature, temperature)
    sample_kernel[(num_rows,)](
        logits, scratch, candidates, temperature, *(f if f is not None else temperature for f in filters),
        keys, said.output_counts, said.prompt_mask, said.repetition, said.presence, said.frequency,
        tokens, logprobs, logits.stride(0), vocabulary, FILTER=filtered, PENALISE=penalties is not None,
        BLOCK=_pivot_block(current_target()), WIDE=_WIDE, LIMIT=_LIMIT, num_warps=16,
    )  # fmt: skip
    return tokens, logprobs
