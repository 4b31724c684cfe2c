"""Runs `checks/` in a process of its own, where Triton's (repaired, stricter) interpreter stands in for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FILES = sorted(path.name for path in (HERE / "checks").glob("check_*.py"))


@pytest.mark.timeout(170)
@pytest.mark.parametrize("name", FILES)
def test_kernels_match_float64_and_touch_only_their_memory(name):
    options = [
        "-q",
        "-p",
        "tests.kernels.triton.check_plugin",
        "-o",
        "python_files=check_*.py",
        "-p",
        "no:cacheprovider",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(HERE / "checks" / name)],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=160, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
