"""The GPU backend: every op of `kernels` as a Triton kernel, one file per op, for NVIDIA and AMD from one source.

Importing this package imports Triton; with `TRITON_INTERPRET=1` set before, the kernels run on the CPU, slowly.
"""

from kernels.triton.block_checksum import block_checksum
from kernels.triton.block_copy import copy_blocks, gather_blocks, scatter_blocks
from kernels.triton.draw import draw
from kernels.triton.paged_attention import paged_attention
from kernels.triton.pending_tokens import fill_pending
from kernels.triton.rms_norm import fused_add_rms_norm, rms_norm
from kernels.triton.rotary import rotary, rotary_write_kv
from kernels.triton.sample import Penalties, sample
from kernels.triton.silu_and_mul import silu_and_mul
from kernels.triton.write_kv import write_kv

__all__ = [
    "Penalties",
    "block_checksum",
    "copy_blocks",
    "draw",
    "fill_pending",
    "fused_add_rms_norm",
    "gather_blocks",
    "paged_attention",
    "rms_norm",
    "rotary",
    "rotary_write_kv",
    "sample",
    "scatter_blocks",
    "silu_and_mul",
    "write_kv",
]
