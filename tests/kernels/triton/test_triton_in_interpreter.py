"""Runs `checks/` in processes of their own, in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.triton.interpreted import interpreted

CHECKS = Path(__file__).parent / "checks"
FILES = sorted(path.name for path in CHECKS.glob("check_*.py"))


def command(name):
    return interpreted(CHECKS / name)


@pytest.mark.timeout(660)
@pytest.mark.parametrize("name", FILES)
def test_kernels_match_float64_and_touch_only_their_memory(runs, name):
    run = runs(name)
    assert run.code == 0, run.stdout[-6000:] + run.stderr[-2000:]
