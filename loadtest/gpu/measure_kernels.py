"""Checks and times every Triton kernel on the GPU at hand, in one call of a few minutes.

    python -m loadtest.gpu.measure_kernels --out loadtest/gpu/results

writes `<gpu>.json` and `<gpu>.md`. The tests walk every line of it without a GPU: `measure("cpu")` in Triton's
interpreter, on tiny shapes, with times that mean nothing.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from loadtest.gpu.correctness import run_checks
from loadtest.gpu.limits import Limits, measure_limits
from loadtest.gpu.measure_attention import measure_decode, measure_prefill
from loadtest.gpu.measure_others import measure_blocks, measure_cache_write, measure_rowwise, measure_sampling
from loadtest.gpu.report import Report, Row
from loadtest.gpu.timing import Stopwatch


def main() -> int:
    """Run everything on the GPU; the exit status is 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("loadtest/gpu/results"), help="folder of the results")
    options = parser.parse_args()
    report = measure("cuda")
    name = torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")
    report.write(options.out, name)
    return 0 if all(check.passes for check in report.checks) else 1


def measure(device: str) -> Report:
    """Check, then time; say each result as it comes. On "cpu", tiny shapes."""
    torch.manual_seed(0)
    small = device == "cpu"
    checks = run_checks(device, small=small)
    for check in checks:
        if not check.passes:
            print(f"FAILED {check.name}: {check.error:.2e} > {check.tolerance:.0e}", flush=True)
    watch = Stopwatch(device)
    limits, rows = measure_limits(watch, small=small)
    for row in _measure(watch, limits, small=small):
        rows.append(row)
        print(f"{row.name}: {row.time_us:.1f} us, {row.rate:.3g} {row.unit}", flush=True)
    return Report(hardware(device), checks, rows)


def _measure(watch: Stopwatch, limits: Limits, *, small: bool) -> Iterator[Row]:
    yield from measure_decode(watch, limits, small=small)
    yield from measure_prefill(watch, limits, small=small)
    yield from measure_rowwise(watch, limits, small=small)
    yield from measure_cache_write(watch, limits, small=small)
    yield from measure_blocks(watch, limits, small=small)
    yield from measure_sampling(watch, small=small)


def hardware(device: str) -> dict[str, str]:
    """What results are of."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else "none"
    return {
        "GPU": gpu,
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "Triton": triton.__version__,
        "Python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(main())
