"""Runs `checks/` in processes of their own, where Triton's (repaired, stricter) interpreter stands in for a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

CHECKS = Path(__file__).parent / "checks"
LONGEST = "check_measurements.py"  # begun first, so that no core waits for it in the end
FILES = sorted((path.name for path in CHECKS.glob("check_*.py")), key=lambda name: (name != LONGEST, name))


def command(name):
    options = ["-q", "-p", "tests.kernels.triton.check_plugin", "-p", "no:cacheprovider", "-o", "timeout=300"]
    return ["-m", "pytest", *options, "-o", "python_files=check_*.py", str(CHECKS / name)], {"TRITON_INTERPRET": "1"}


@pytest.mark.timeout(660)
@pytest.mark.parametrize("name", FILES)
def test_kernels_match_float64_and_touch_only_their_memory(runs, name):
    run = runs(name)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
