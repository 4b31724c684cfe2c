"""The oracle: every op as slow and obvious torch, on any device. Its docstrings specify all backends."""

from kernels.reference.copy_blocks import copy_blocks
from kernels.reference.paged_attention import paged_attention
from kernels.reference.quantized_linear import quantized_linear
from kernels.reference.rms_norm import fused_add_rms_norm, rms_norm
from kernels.reference.rotary import rotary
from kernels.reference.rotary_write_kv import rotary_write_kv
from kernels.reference.silu_and_mul import silu_and_mul
from kernels.reference.write_kv import write_kv

__all__ = [
    "copy_blocks",
    "fused_add_rms_norm",
    "paged_attention",
    "quantized_linear",
    "rms_norm",
    "rotary",
    "rotary_write_kv",
    "silu_and_mul",
    "write_kv",
]
