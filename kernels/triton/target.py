"""What the kernels need to know about the device they are launched on, asked without touching the device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from triton.runtime.driver import driver

_OFFLINE_PROCESSORS = 132
"""Processor count assumed for tensors that live on no GPU (interpreter, ahead-of-time compile): that of an H200."""


@dataclass(frozen=True, slots=True)
class Target:
    """The compile target of the current device.

    Attributes:
        is_amd: True for a ROCm device.
        arch: 80, 90, 100, ... on NVIDIA; 0 on AMD.
        shared_bytes: shared memory (LDS) one program may use.
        fp8: its encoding of e4m3, in which a KV cache may be kept; None if it has none.
        is_interpreted: True in Triton's interpreter, which has no device instructions.
    """

    is_amd: bool
    arch: int
    shared_bytes: int
    fp8: torch.dtype | None
    is_interpreted: bool = False

    @property
    def has_wgmma(self) -> bool:
        """True where matrix products of 64 and more rows read shared memory directly (Hopper and later)."""
        return not self.is_amd and self.arch >= 90

    @property
    def overlaps_launches(self) -> bool:
        """True where a kernel can be launched while the one it waits for still runs (Hopper and later)."""
        return not self.is_amd and self.arch >= 90 and not self.is_interpreted


_INTERPRETED = Target(is_amd=False, arch=90, shared_bytes=227 * 1024, fp8=torch.float8_e4m3fn, is_interpreted=True)


def current_target() -> Target:
    """Return the target that a launch made now would be compiled for; the interpreter counts as sm_90."""
    if triton.knobs.runtime.interpret:
        return _INTERPRETED
    found = driver.active.get_current_target()
    return _describe(found.backend, found.arch)


@functools.cache
def _describe(backend: str, arch: int | str) -> Target:
    if backend == "hip":
        fp8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}.get(str(arch))
        return Target(is_amd=True, arch=0, shared_bytes=(160 if arch == "gfx950" else 64) * 1024, fp8=fp8)
    number = int(arch)
    return Target(
        is_amd=False,
        arch=number,
        shared_bytes={80: 163, 90: 227, 100: 227}.get(number, 99) * 1024,
        fp8=torch.float8_e4m3fn if number >= 90 else None,
    )


def kv_dtypes(device: torch.device) -> frozenset[str]:
    """Return the names of the element types that a KV cache on `device` may have beside that of the weights."""
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        return frozenset()
    fp8 = current_target().fp8
    return frozenset() if fp8 is None else frozenset({str(fp8).removeprefix("torch.")})


def largest_stored(dtype: torch.dtype) -> float:
    """Return what a cache of `dtype` saturates at; 0 for a dtype that needs no saturation."""
    return torch.finfo(dtype).max if dtype.itemsize == 1 else 0.0


def num_processors(device: torch.device) -> int:
    """Return the multiprocessors (compute units) of `device`: 132 for a device that is no GPU."""
    if device.type != "cuda":
        return _OFFLINE_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def overlapped(overlap: bool) -> dict[str, bool]:
    """Launch options of a kernel that may begin while the one before it still ends.

    Such a kernel calls `gdc_wait` in every program, before it touches anything that others write: whoever comes after
    it takes its end for the end of all that went before. Only then does it let the next one be launched: more than one
    kernel ahead, waiting programs would take the place of working ones.
    """
    return {"launch_pdl": True} if overlap else {}
