"""Tests whose work is a process each run these side by side, as many as there are cores for this process of tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SHARE = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Callable[[str], subprocess.CompletedProcess[str]]]:
    """Waits for the process of a test, by the test's parameter; the module's `command` says what is run for it."""
    names = [next(iter(item.callspec.params.values())) for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(SHARE) as pool:
        started: dict[str, Future] = {name: pool.submit(_run, *request.module.command(name)) for name in names}
        yield lambda name: started[name].result()
        for future in started.values():
            future.cancel()


def _run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=600, check=False)
