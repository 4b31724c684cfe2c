"""Puts tokens that were sampled a step ago, and never left the device, where this step reads its token ids."""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

import torch
import triton
import triton.language as tl

_BLOCK = 256


@triton.jit(do_not_specialize=["num_tokens"])
def fill_pending_kernel(
    token_ids,  # int64 [T], modified
    sources,  # int32 [T]
    sampled,  # int64 [S]
    num_tokens,
    BLOCK: tl.constexpr,
):
    """Grid (run of BLOCK tokens)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(sources + i, mask=i < num_tokens, other=-1)
    is_pending = source >= 0
    tl.store(token_ids + i, tl.load(sampled + source, mask=is_pending, other=0), mask=is_pending)


def fill_pending(token_ids: torch.Tensor, sources: torch.Tensor, sampled: torch.Tensor) -> None:
    """Set `token_ids[i] = sampled[sources[i]]` where `sources[i] >= 0`.

    Args:
        token_ids: int64 `[T]`, modified.
        sources: int32 `[T]`; negative leaves the token as it is.
        sampled: int64 `[S]`.
    """
    num_tokens = token_ids.shape[0]
    fill_pending_kernel[(triton.cdiv(num_tokens, _BLOCK),)](
        token_ids, sources, sampled, num_tokens, BLOCK=_BLOCK, num_warps=4
    )
