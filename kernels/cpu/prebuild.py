"""Compiles the library for every instruction set of this machine's architecture, for machines without a compiler.

    python -m kernels.cpu.prebuild [DIRECTORY]      default: where `kernels.cpu.build` looks first

Container images run it in a stage that has a compiler and carry what it wrote. Needs neither torch nor a processor that
has the instructions.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from kernels.cpu.build import PREBUILT, Isa, compile_library, find_compiler, prebuilt_path

ARM = (Isa.NEON_DOT, Isa.GENERIC)


def isas_of(machine: str) -> list[Isa]:
    """All that a processor of an architecture may have."""
    if machine == "aarch64":
        return list(ARM)
    return [isa for isa in Isa if isa is not Isa.NEON_DOT] if machine == "x86_64" else [Isa.GENERIC]


def prebuild(directory: Path) -> list[Path]:
    """Writes the libraries and returns their paths; blocks for about a minute.

    Raises:
        NativeUnavailableError: There is no compiler.
        subprocess.CalledProcessError: It fails.
    """
    compiler = find_compiler()
    paths = []
    for isa in isas_of(platform.machine()):
        path = prebuilt_path(directory, isa)
        if not path.exists():
            compile_library(compiler, isa, path)
        paths.append(path)
    return paths


if __name__ == "__main__":
    for library in prebuild(Path(sys.argv[1]) if len(sys.argv) > 1 else PREBUILT):
        sys.stdout.write(f"{library}\n")
