"""Compiles kernel launches for GPU targets on a machine that has none, and reads off what they will cost.

Inside `compiled_for(target)` every `kernel[grid](...)` is compiled with the signature and the specialisation that it
would have on the device (meta tensors will do) and nothing is launched.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
_SHARED_PER_PROGRAM_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64, "gfx950": 160}
_SHARED_PER_PROCESSOR_KIB = {"sm_80": 164, "sm_90": 228, "sm_100": 228, "gfx942": 64, "gfx950": 160}
_NVIDIA_MATRIX = {
    "wgmma": r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)",
    "tcgen05": r"tcgen05\.mma()\b",  # whose shape is an operand
    "mma": r"\bmma\.sync\.aligned\.(m\d+n\d+k\d+)",
}


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel takes of a multiprocessor.

    Attributes:
        registers: per thread (vector registers on AMD).
        spill_bytes: per thread, pushed out to local memory.
        shared_bytes: per program.
        programs: resident per multiprocessor (compute unit), as registers and shared memory allow.
        matrix: matrix-unit instruction found: wgmma, tcgen05, mma, mfma or none.
        shapes: of those instructions, where their names tell.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    programs: int
    matrix: str
    shapes: str = ""

    def as_row(self) -> dict[str, int | str]:
        return asdict(self)


class _OfflineDriver:
    """Stands in for the GPU driver; answers only what compiling asks."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, _device: int = 0) -> int:
        return 0


@contextlib.contextmanager
def compiled_for(name: str) -> Iterator[dict[str, Resources]]:
    """Compile every launch made inside for target `name`; yields kernel name to resources, filled as they come."""
    target = TARGETS[name]
    found: dict[str, Resources] = {}
    original_run, original_driver = JITFunction.run, driver._active

    def compile_only(self: Any, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> Any:
        kernel = original_run(self, *args, grid=(1, 1, 1), warmup=True, **kwargs)
        found[self.fn.__name__] = _amd(kernel, name) if target.backend == "hip" else _nvidia(kernel, name)
        return kernel

    driver.set_active(_OfflineDriver(target))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = original_run
        driver._active = original_driver


def fits(resources: Resources, name: str) -> bool:
    """Whether one program's shared memory exists on the target."""
    return resources.shared_bytes <= _SHARED_PER_PROGRAM_KIB[name] * 1024


def _nvidia(kernel: Any, name: str) -> Resources:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(kernel.asm["cubin"])
        binary.flush()
        listing = subprocess.run(
            [tool, "--dump-resource-usage", binary.name], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}
    warps, shared = kernel.metadata.num_warps, int(kernel.metadata.shared)
    per_warp = -(-usage["REG"] * 32 // 256) * 256
    programs = min(65536 // (per_warp * warps), 64 // warps, _SHARED_PER_PROCESSOR_KIB[name] * 1024 // (shared + 1024))
    ptx = kernel.asm["ptx"]
    found = ((unit, set(re.findall(pattern, ptx))) for unit, pattern in _NVIDIA_MATRIX.items())
    matrix, shapes = next(((unit, shapes) for unit, shapes in found if shapes), ("none", set()))
    spilled = usage.get("STACK", 0) + usage.get("LOCAL", 0)
    return Resources(usage["REG"], spilled, shared, programs, matrix, " ".join(sorted(shapes)))


def _amd(kernel: Any, name: str) -> Resources:
    text = kernel.asm["amdgcn"]

    def field(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(match[1]) if match else 0

    warps, shared = kernel.metadata.num_warps, int(kernel.metadata.shared)
    registers = field("vgpr_count")
    waves_per_simd = min(8, 512 // max(1, -(-registers // 8) * 8))
    programs = min(waves_per_simd * 4 // warps, _SHARED_PER_PROCESSOR_KIB[name] * 1024 // max(1, shared))
    shapes = set(re.findall(r"v_mfma_f32_(\d+x\d+x\d+)", text))
    matrix = "mfma" if shapes else "none"
    return Resources(registers, 4 * field("vgpr_spill_count"), shared, programs, matrix, " ".join(sorted(shapes)))
