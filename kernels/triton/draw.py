"""Chooses a token per row from the whole softmax, greedily or with noise, over as many programs as the device holds.

A vocabulary is cut into chunks. A program takes one and keeps the best score and the first token that has it; a second
launch takes the best of a row's chunks. Rows that cut the distribution (top-k, top-p, min-p) go to `sample`.
"""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

import torch
import triton
import triton.language as tl

from kernels.triton.noise import gumbel_noise

_BLOCK = 2048
_CHUNK = 8192


@triton.jit
def draw_chunk_kernel(
    logits,  # [S, V]
    temperature,  # fp32 [S]
    keys,  # int64 [S]
    best_scores,  # fp32 [S, chunks], written
    best_tokens,  # int32 [S, chunks], written
    logits_stride,
    V,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (chunk, row)."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    heat = tl.load(temperature + row)
    key = tl.load(keys + row)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32) + chunk * CHUNK
    for start in tl.range(chunk * CHUNK, chunk * CHUNK + CHUNK, BLOCK):
        token = start + tl.arange(0, BLOCK)
        score = tl.load(logits + row * logits_stride + token, mask=token < V, other=float("-inf")).to(tl.float32)
        if heat > 0.0:
            score = score / heat + gumbel_noise(key, token)
        where = tl.where(score > best, token, where)
        best = tl.maximum(best, score)
    winner = tl.max(best, 0)
    first = tl.min(tl.where(best == winner, where, V), 0)
    tl.store(best_scores + row * tl.num_programs(0) + chunk, winner)
    tl.store(best_tokens + row * tl.num_programs(0) + chunk, first)


@triton.jit
def draw_merge_kernel(
    best_scores,  # fp32 [S, chunks]
    best_tokens,  # int32 [S, chunks]
    tokens,  # int64 [S], written
    num_chunks,
    PAD: tl.constexpr,
):
    """Grid (row)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, PAD)
    scores = tl.load(best_scores + row * num_chunks + c, mask=c < num_chunks, other=float("-inf"))
    found = tl.load(best_tokens + row * num_chunks + c, mask=c < num_chunks, other=2147483647)
    winner = tl.max(scores, 0)
    tl.store(tokens + row, tl.min(tl.where(scores == winner, found, 2147483647), 0).to(tl.int64))


def draw(logits: torch.Tensor, temperature: torch.Tensor, keys: torch.Tensor, tokens: torch.Tensor) -> None:
    """Write one token per row into `tokens`.

    Args:
        logits: `[S, V]`, any float dtype, last dimension contiguous; -inf forbids a token. Not modified.
        temperature: fp32 `[S]`; 0 takes the largest logit, lowest id first.
        keys: int64 `[S]`, of the noise; see `sample`.
        tokens: int64 `[S]`, written.
    """
    num_rows, vocabulary = logits.shape
    if num_rows == 0:
        return
    chunks = triton.cdiv(vocabulary, _CHUNK)
    scores = torch.empty((num_rows, chunks), dtype=torch.float32, device=logits.device)
    found = torch.empty((num_rows, chunks), dtype=torch.int32, device=logits.device)
    draw_chunk_kernel[(chunks, num_rows)](
        logits, temperature, keys, scores, found, logits.stride(0), vocabulary, CHUNK=_CHUNK, BLOCK=_BLOCK, num_warps=8
    )
    draw_merge_kernel[(num_rows,)](
        scores, found, tokens, chunks, PAD=max(16, triton.next_power_of_2(chunks)), num_warps=1
    )
