"""Runs `checks/` in processes of their own, where Triton's (repaired, stricter) interpreter stands in for a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.triton.forks import Command

CHECKS = Path(__file__).parent / "checks"
LONGEST = "check_measurements.py"  # begun first, so that no core waits for it in the end
FILES = sorted((path.name for path in CHECKS.glob("check_*.py")), key=lambda name: (name != LONGEST, name))


def command(name):
    plugins = ["pytest_asyncio.plugin", "pytest_timeout", "tests.kernels.triton.check_plugin", "no:cacheprovider"]
    options = ["-q", *(f"-p{plugin}" for plugin in plugins), "-otimeout=300", "-opython_files=check_*.py"]
    # Without loading those that only other tests need, which takes longer than some of these checks.
    settings = {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return Command("pytest", [*options, str(CHECKS / name)], settings)


@pytest.mark.timeout(660)
@pytest.mark.parametrize("name", FILES)
def test_kernels_match_float64_and_touch_only_their_memory(runs, name):
    run = runs(name)
    assert run.code == 0, run.stdout[-6000:] + run.stderr[-2000:]
