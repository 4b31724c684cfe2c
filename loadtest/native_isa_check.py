"""Proves and times the native kernels on every instruction set of the machine it runs on.

    python3 loadtest/native_isa_check.py [--threads N] [--quick]

Needs torch, numpy, pytest and g++, nothing else of the project's dependencies: made for a machine lent for minutes.
Prints the processor, the outcome of the kernels' tests, and times per instruction set.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]


class _Log:
    """Stands in for structlog, which a bare machine lacks."""

    def __getattr__(self, name: str) -> object:
        return lambda event, **fields: print(f"[{name}] {event} {fields}", flush=True)


def prepare() -> None:
    """Makes the project importable here and in child processes."""
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        import structlog  # noqa: F401
    except ImportError:
        stand_in = types.ModuleType("structlog")
        stand_in.get_logger = lambda *_: _Log()  # type: ignore[attr-defined]
        sys.modules["structlog"] = stand_in


def print_machine() -> None:
    """Processor, relevant flags, compiler."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    print(next((line for line in lines if line.startswith("model name")), platform.machine()))
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    print("flags:", *sorted(flag for flag in flags if flag.startswith(("amx", "avx"))))
    print(subprocess.run(["g++", "--version"], capture_output=True, text=True, check=False).stdout.partition("\n")[0])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="8")
    parser.add_argument("--quick", action="store_true", help="no timings")
    arguments = parser.parse_args()
    prepare()
    print_machine()
    import pytest

    from kernels.cpu.build import supported_isas

    isas = [isa.name for isa in supported_isas()]
    print("instruction sets:", *isas, flush=True)
    folder = ROOT / "tests" / "kernels" / "native"
    tests = [str(folder / f"test_{name}.py") for name in ("native_kernels", "native_quantized", "native_isas")]
    options = ["-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={ROOT}"]
    outcome = pytest.main([*tests, *options, "--noconftest", "--tb=short", "--maxfail=5"])
    print("tests:", "passed" if outcome == 0 else f"FAILED ({outcome})", flush=True)
    if arguments.quick:
        return
    from loadtest.engine import kernels_bench

    for isa in isas[:2]:
        sys.argv = ["kernels_bench", "--isa", isa, "--threads", arguments.threads, "--shapes", "135m"]
        sys.argv += ["--formats", "bf16,int8,int4", "--rounds", "9", "--no-torch"]
        kernels_bench.main()


if __name__ == "__main__":
    main()
