"""The ops of invariant mode: a token's bits are the same alone, in any batch, and however its prompt was chunked.

Norms, activation, rotary embedding and cache writes are the usual ones: a row's work depends on its width alone.
Attention is a kernel of its own, and so are the linear layers (`invariant_linear`).
"""

from kernels.triton.invariant_attention import paged_attention
from kernels.triton.rms_norm import fused_add_rms_norm, rms_norm
from kernels.triton.rotary import rotary, rotary_write_kv
from kernels.triton.silu_and_mul import silu_and_mul
from kernels.triton.write_kv import write_kv

__all__ = [
    "fused_add_rms_norm",
    "paged_attention",
    "rms_norm",
    "rotary",
    "rotary_write_kv",
    "silu_and_mul",
    "write_kv",
]
