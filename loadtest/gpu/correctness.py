"""Every kernel against float64 on the device it will be timed on: fresh random inputs, shapes that models use."""

from __future__ import annotations

import torch

from kernels import triton as ops
from loadtest.gpu import oracles
from loadtest.gpu.report import Check

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3}
_HEADS = {64: (3, 3), 96: (32, 1), 128: (8, 4), 256: (4, 8)}
"""Head dimension to (KV heads, query heads per KV head): SmolLM2, Phi-3, Llama-3, Gemma-like."""
_CACHES = [
    (64, 32, torch.float16),
    (96, 64, torch.bfloat16),
    (128, 16, torch.bfloat16),
    (128, 128, torch.bfloat16),
    (256, 16, torch.bfloat16),
]
"""Head dimension, page and dtype."""


def run_checks(device: str, *, small: bool) -> list[Check]:
    """Return one result per kernel and configuration; `small` shrinks the shapes for a run without a GPU."""
    checks = []
    for head_dim, page, dtype in _CACHES[:1] if small else _CACHES:
        checks += [
            _attention(device, name, *lens, head_dim=head_dim, page=page, dtype=dtype)
            for name, lens in _batches(small).items()
        ]
    checks += [*_rowwise(device, 5 if small else 777), *_caches(device), *_blocks(device)]
    return checks


def _batches(small: bool) -> dict[str, tuple[list[int], list[int]]]:
    if small:
        return {"decode": ([1, 1], [40, 7]), "mixed": ([1, 20], [30, 33])}
    return {
        "decode": ([1] * 9, [1, 15, 16, 127, 129, 1000, 2048, 4097, 9000]),
        "speculative decode": ([8, 4, 1], [5000, 300, 1]),
        "mixed": ([1, 700, 2, 1, 130], [3000, 700, 513, 1, 5100]),
        "short chunks": ([40, 300, 9], [40, 900, 1000]),
    }


def _attention(
    device: str, name: str, query_lens: list[int], seq_lens: list[int], *, head_dim: int, page: int, dtype: torch.dtype
) -> Check:
    kv_heads, group = _HEADS[head_dim]
    case = oracles.attention_case(
        query_lens, seq_lens, num_kv_heads=kv_heads, group=group, head_dim=head_dim, page=page, dtype=dtype,
        device=device,
    )  # fmt: skip
    out = ops.paged_attention(
        case.query, case.kv_cache, case.block_tables, case.query_start, case.seq_lens,
        scale=case.scale, max_query_len=case.max_query_len, max_seq_len=case.max_seq_len,
    )  # fmt: skip
    error = oracles.relative_error(out, oracles.attention(case))
    short = str(dtype).removeprefix("torch.")
    return Check(
        f"attention, {name}, {kv_heads * group}/{kv_heads} heads of {head_dim}, page {page}, {short}",
        error,
        TOLERANCE[dtype],
    )


def _rowwise(device: str, rows: int) -> list[Check]:
    x = torch.randn(rows, 4096, device=device).bfloat16()
    residual, weight = torch.randn_like(x), torch.randn(4096, device=device).bfloat16()
    normed, summed = ops.fused_add_rms_norm(x, residual, weight, 1e-5)
    tolerance = 4e-3
    return [
        Check(
            "rms_norm",
            oracles.relative_error(ops.rms_norm(x, weight, 1e-5), oracles.rms_norm(x, weight, 1e-5)),
            tolerance,
        ),
        Check(
            "fused_add_rms_norm, norm",
            oracles.relative_error(normed, oracles.rms_norm(summed, weight, 1e-5)),
            tolerance,
        ),
        Check("fused_add_rms_norm, sum", oracles.relative_error(summed, x.double() + residual.double()), tolerance),
        Check("silu_and_mul", oracles.relative_error(ops.silu_and_mul(x), oracles.silu_and_mul(x)), tolerance),
    ]


def _caches(device: str) -> list[Check]:
    q, k, v = (torch.randn(37, heads, 128, device=device).bfloat16() for heads in (32, 8, 8))
    arena = torch.zeros(8, 2, 2, 16, 8, 128, device=device, dtype=torch.bfloat16)
    positions, slots = torch.randint(0, 4096, (37,), device=device), torch.randperm(128, device=device)[:37]
    table = oracles.angles(4096, 128, device)
    want_q, want_k = (oracles.rotated(x, positions, table) for x in (q, k))
    ops.rotary_write_kv(q, k, v, positions, table, arena[:, 1], slots)
    found_k, found_v = (arena[slots // 16, 1, i, slots % 16] for i in (0, 1))
    return [
        Check("rotary_write_kv, queries", oracles.relative_error(q, want_q), 4e-3),
        Check("rotary_write_kv, cached keys", oracles.relative_error(found_k, want_k), 4e-3),
        Check("rotary_write_kv, cached values", oracles.relative_error(found_v, v.double()), 0.0),
    ]


def _blocks(device: str) -> list[Check]:
    arena = torch.randint(0, 256, (6, 4096), dtype=torch.uint8, device=device)
    ids = torch.tensor([4, 1], device=device)
    staging = torch.zeros(2, 4096, dtype=torch.uint8, device=device)
    ops.gather_blocks(arena, ids, staging)
    sums = ops.block_checksum(arena, ids).tolist()
    wrong_sums = sum(found != oracles.checksum(arena[i]) for i, found in zip((4, 1), sums, strict=True))
    return [
        Check("gather_blocks", oracles.relative_error(staging.float(), arena[ids].float()), 0.0),
        Check("block_checksum, wrong sums", float(wrong_sums), 0.0),
    ]
