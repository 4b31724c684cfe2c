"""The launches whose resources are checked on every target: one name per kernel and configuration, on meta tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels import triton as ops
from kernels.triton import invariant
from kernels.triton.decode_attention import decode_attention
from kernels.triton.invariant_linear import invariant_matmul
from kernels.triton.linear import one_row_linear
from kernels.triton.prefill_attention import prefill_attention
from kernels.triton.prefill_hopper_attention import prefill_hopper_attention
from kernels.triton.target import current_target


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _attention(
    *,
    head_dim: int,
    page: int,
    group: int = 4,
    queries: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    cache: torch.dtype | None = None,
    num_seqs: int = 8,
) -> tuple[torch.Tensor, ...]:
    """Return query, cache view, tables, starts, lengths and output over eight KV heads."""
    query = _meta(num_seqs * queries, 8 * group, head_dim, dtype=dtype)
    arena = _meta(1024, 32, 2, page, 8, head_dim, dtype=cache or dtype)
    tables = _meta(num_seqs, 512, dtype=torch.int32)
    return query, arena[:, 3], tables, _meta(num_seqs + 1, dtype=torch.int32), _meta(num_seqs, dtype=torch.int32), query


def _decode(
    head_dim: int,
    page: int,
    group: int = 4,
    queries: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    cache: torch.dtype | None = None,
    num_seqs: int = 8,
) -> None:
    inputs = _attention(
        head_dim=head_dim, page=page, group=group, queries=queries, dtype=dtype, cache=cache, num_seqs=num_seqs
    )
    decode_attention(*inputs, scale=0.1, max_query_len=queries, max_seq_len=4096)


def _prefill(
    head_dim: int,
    page: int,
    group: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    max_seq_len: int = 8192,
    cache: torch.dtype | None = None,
) -> None:
    inputs = _attention(head_dim=head_dim, page=page, group=group, queries=512, dtype=dtype, cache=cache)
    prefill_attention(*inputs, scale=0.1, min_query_len=2, max_seq_len=max_seq_len)


def _fp8() -> torch.dtype:
    """The target's own encoding."""
    found = current_target().fp8
    assert found is not None
    return found


def _prefill_hopper(head_dim: int, page: int, group: int = 4, dtype: torch.dtype = torch.bfloat16) -> None:
    inputs = _attention(head_dim=head_dim, page=page, group=group, queries=512, dtype=dtype)
    prefill_hopper_attention(*inputs, scale=0.1, min_query_len=2)


def _rotary_write_kv(cache_dtype: torch.dtype = torch.bfloat16) -> None:
    heads = _meta(64, 48, 128)
    cache = _meta(1024, 32, 2, 16, 8, 128, dtype=cache_dtype)[:, 3]
    ids = _meta(64, dtype=torch.int64)
    angles = _meta(8192, 128, dtype=torch.float32)
    ops.rotary_write_kv(heads[:, :32], heads[:, 32:40], heads[:, 40:], ids, angles, cache, ids)


def _sample() -> None:
    row = _meta(64, dtype=torch.float32)
    ids = _meta(64, dtype=torch.int64)
    counts, seen = _meta(64, 128256, dtype=torch.int32), _meta(64, 128256, dtype=torch.uint8)
    ops.sample(
        _meta(64, 128256), temperature=row, keys=ids, top_k=_meta(64, dtype=torch.int32), top_p=row,
        min_p=row, penalties=ops.Penalties(counts, seen, row, row, row),
    )  # fmt: skip


def _draw() -> None:
    ids = _meta(64, dtype=torch.int64)
    ops.draw(_meta(64, 128256), _meta(64, dtype=torch.float32), ids, ids)


def _fill_pending() -> None:
    ids = _meta(64, dtype=torch.int64)
    ops.fill_pending(ids, _meta(64, dtype=torch.int32), ids)


def _one_row_linear() -> None:
    one_row_linear(_meta(1, 4096), _meta(6144, 4096), None)


def _invariant_attention(head_dim: int, page: int, *, queries: int, cache: torch.dtype | None = None) -> None:
    *inputs, _ = _attention(head_dim=head_dim, page=page, queries=queries, cache=cache)
    invariant.paged_attention(*inputs, scale=0.1, max_query_len=queries, max_seq_len=8192)


def _invariant_linear(rows: int) -> None:
    invariant_matmul(_meta(rows, 4096), _meta(4096, 4096), None)


def _checksum() -> None:
    ops.block_checksum(_meta(1024, 1 << 21, dtype=torch.uint8), _meta(125, dtype=torch.int64))


def _gather() -> None:
    ops.gather_blocks(_meta(1024, 1 << 20), _meta(125, dtype=torch.int64), _meta(125, 1 << 20))


def _write_kv() -> None:
    rows = _meta(64, 8, 128)
    ops.write_kv(rows, rows, _meta(1024, 32, 2, 16, 8, 128)[:, 3], _meta(64, dtype=torch.int64))


def _rms_norm() -> None:
    ops.fused_add_rms_norm(_meta(64, 4096), _meta(64, 4096), _meta(4096), 1e-5)


def _silu_and_mul() -> None:
    ops.silu_and_mul(_meta(64, 28672))


_WITHOUT_FP8 = frozenset({"sm_80"})
_HOPPER = frozenset({"sm_90"})

LAUNCHES: dict[str, Callable[[], None]] = {
    "decode d128 page16": lambda: _decode(128, 16),
    "decode d128 page128": lambda: _decode(128, 128),
    "decode d128 page16 64 sequences": lambda: _decode(128, 16, num_seqs=64),
    "decode d128 page16 8 queries": lambda: _decode(128, 16, queries=8),
    "decode d128 page16 fp8": lambda: _decode(128, 16, cache=_fp8()),
    "decode d64 page32 fp16": lambda: _decode(64, 32, dtype=torch.float16),
    "decode d96 page64": lambda: _decode(96, 64),
    "decode d256 page16": lambda: _decode(256, 16),
    "prefill d128 page16": lambda: _prefill(128, 16),
    "prefill d128 page128": lambda: _prefill(128, 128),
    "prefill d128 page16 short": lambda: _prefill(128, 16, max_seq_len=2048),
    "prefill d128 page16 fp8": lambda: _prefill(128, 16, cache=_fp8()),
    "prefill d64 page32 fp16": lambda: _prefill(64, 32, group=3, dtype=torch.float16),
    "prefill d96 page64": lambda: _prefill(96, 64, group=1),
    "prefill d256 page16": lambda: _prefill(256, 16),
    "hopper prefill d128 page16": lambda: _prefill_hopper(128, 16),
    "hopper prefill d128 page128": lambda: _prefill_hopper(128, 128),
    "hopper prefill d64 page32 fp16": lambda: _prefill_hopper(64, 32, group=3, dtype=torch.float16),
    "invariant decode d128 page16": lambda: _invariant_attention(128, 16, queries=1),
    "invariant decode d128 page16 fp8": lambda: _invariant_attention(128, 16, queries=1, cache=_fp8()),
    "invariant prefill d128 page16": lambda: _invariant_attention(128, 16, queries=512),
    "invariant prefill d64 page32": lambda: _invariant_attention(64, 32, queries=512),
    "invariant prefill d256 page16": lambda: _invariant_attention(256, 16, queries=512),
    "invariant linear 1 row": lambda: _invariant_linear(1),
    "invariant linear 2048 rows": lambda: _invariant_linear(2048),
    "rotary and write_kv": _rotary_write_kv,
    "rotary and write_kv fp8": lambda: _rotary_write_kv(_fp8()),
    "write_kv": _write_kv,
    "rms_norm 4096": _rms_norm,
    "silu_and_mul": _silu_and_mul,
    "block_checksum": _checksum,
    "gather_blocks": _gather,
    "sample": _sample,
    "draw": _draw,
    "one_row_linear": _one_row_linear,
    "fill_pending": _fill_pending,
}


def launches_of(target: str) -> dict[str, Callable[[], None]]:
    """Return the launches that exist on `target`."""
    without_fp8, is_hopper = target in _WITHOUT_FP8, target in _HOPPER
    return {
        name: run
        for name, run in LAUNCHES.items()
        if not (name.endswith("fp8") and without_fp8) and (is_hopper or not name.startswith("hopper"))
    }
