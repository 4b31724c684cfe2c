"""What a measurement was made on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from kernels.cpu.build import Isa, supported_isas

PACKAGES = ("torch", "transformers", "llama_cpp_python")
MULTIPLIES_BFLOAT16 = {Isa.AMX, Isa.AVX512_BF16}


def machine(threads: int) -> str:
    """Hardware and versions, in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    isa = supported_isas()[0].name
    return f"{model} ({isa}), {threads} of {os.cpu_count()} threads, Python {platform.python_version()}, {versions}"


def multiplies_bfloat16() -> bool:
    """Without such instructions torch crawls in bfloat16, and everybody is fastest with something wider."""
    return supported_isas()[0] in MULTIPLIES_BFLOAT16
