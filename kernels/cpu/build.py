"""Finds the compiled library: prebuilt beside this file (`kernels.cpu.prebuild`), or compiled on first use.

What is compiled here is kept in the user's cache, once per source, instruction set and compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from enum import Enum
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

SOURCE = Path(__file__).parent / "src"
PREBUILT = Path(__file__).parent / "prebuilt"
COMPILERS = ("g++", "clang++")
# Nothing is contracted: GCC 13 fuses an expression in one loop and not in another, and bits depend on the batch then.
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
COMPILE_TIMEOUT_S = 300


class Isa(Enum):
    """An instruction set, best first; the value is the compiler's flags, as one would type them."""

    AMX = "-march=x86-64-v4 -mavx512vnni -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8"
    AVX512_BF16 = "-march=x86-64-v4 -mavx512vnni -mavx512bf16"
    AVX512_VNNI = "-march=x86-64-v4 -mavx512vnni"
    AVX512 = "-march=x86-64-v4"
    AVX2_VNNI = "-march=x86-64-v3 -mavxvnni"
    AVX2 = "-march=x86-64-v3"
    NEON_DOT = "-march=armv8.2-a+dotprod"
    GENERIC = ""  # text, because Enum of Python 3.11.2 (Debian 12's) makes something else of an empty tuple

    @property
    def flags(self) -> tuple[str, ...]:
        """One argument each."""
        return tuple(self.value.split())


_AVX2 = {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"}
_AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
REQUIRED_FLAGS = {
    Isa.AMX: _AVX512 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"},
    Isa.AVX512_BF16: _AVX512 | {"avx512_vnni", "avx512_bf16"},
    Isa.AVX512_VNNI: _AVX512 | {"avx512_vnni"},
    Isa.AVX512: _AVX512,
    Isa.AVX2_VNNI: _AVX2 | {"avx_vnni"},
    Isa.AVX2: _AVX2,
    Isa.NEON_DOT: {"asimd", "asimddp"},
    Isa.GENERIC: set[str](),
}
"""CPU flags, as Linux names them, without which the set's code would trap."""


class NativeUnavailableError(RuntimeError):
    """The library cannot be built here; the message says why."""


def supported_isas() -> list[Isa]:
    """What this processor runs, best first."""
    flags: set[str] = set()
    if platform.machine() in ("x86_64", "aarch64"):
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        flags = next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())
    supported = [isa for isa in Isa if flags >= REQUIRED_FLAGS[isa]]
    return supported if Isa.AMX not in supported or _tiles_permitted() else supported[1:]


def _tiles_permitted() -> bool:
    """Asks the kernel for AMX's registers, which it gives to processes that ask."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


def build(isa: Isa) -> Path:
    """The compiled library's path. Blocks for some seconds when it is neither prebuilt nor cached yet.

    A prebuilt library counts only if it was made of the very sources that are here.

    Raises:
        NativeUnavailableError: There is no compiler, or it fails, or the cache cannot be written.
    """
    if (prebuilt := prebuilt_path(PREBUILT, isa)).exists():
        return prebuilt
    compiler = find_compiler()
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
        path = _cache_directory() / f"{isa.name.lower()}-{_digest(isa, version)}.so"
        if not path.exists():
            compile_library(compiler, isa, path)
    except (OSError, subprocess.SubprocessError) as exc:
        detail = exc.stderr.decode(errors="replace")[-2000:] if isinstance(exc, subprocess.CalledProcessError) else exc
        raise NativeUnavailableError(f"{compiler} did not build the CPU kernels: {detail}") from exc
    return path


def prebuilt_path(directory: Path, isa: Isa) -> Path:
    """Where a library prebuilt of these sources lies, whatever the compiler was."""
    return directory / f"{isa.name.lower()}-{_digest(isa, b'')}.so"


def find_compiler() -> str:
    """Path of a C++ compiler.

    Raises:
        NativeUnavailableError: There is none.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise NativeUnavailableError(f"no C++ compiler found (looked for {', '.join(COMPILERS)})")
    return compiler


def compile_library(compiler: str, isa: Isa, path: Path) -> None:
    """Writes under another name, then renames: processes that start together never load half a file."""
    log.info("compiling_cpu_kernels", isa=isa.name, compiler=compiler, once=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        output = Path(scratch) / path.name
        command = [compiler, *FLAGS, *isa.flags, "-o", str(output), str(SOURCE / "library.cpp")]
        subprocess.run(command, capture_output=True, check=True, timeout=COMPILE_TIMEOUT_S)
        output.replace(path)


def _digest(isa: Isa, version: bytes) -> str:
    digest = hashlib.blake2b(version + " ".join(FLAGS + isa.flags).encode(), digest_size=10)
    for file in sorted(SOURCE.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tandem" / "kernels"
