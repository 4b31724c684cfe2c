"""The ops as plain torch for CPUs: vectorised over sequences, clear before clever. Specified in `kernels.reference`."""

from kernels.cpu_torch.copy_blocks import copy_blocks
from kernels.cpu_torch.paged_attention import paged_attention
from kernels.cpu_torch.rms_norm import fused_add_rms_norm, rms_norm
from kernels.cpu_torch.rotary import rotary
from kernels.cpu_torch.rotary_write_kv import rotary_write_kv
from kernels.cpu_torch.silu_and_mul import silu_and_mul
from kernels.cpu_torch.write_kv import write_kv

__all__ = [
    "copy_blocks",
    "fused_add_rms_norm",
    "paged_attention",
    "rms_norm",
    "rotary",
    "rotary_write_kv",
    "silu_and_mul",
    "write_kv",
]
