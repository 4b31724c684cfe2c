"""Tests whose work is a process each run these side by side, as many as there are cores for this process of tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.kernels.triton import forks

SHARE = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], forks.Ended]]:
    """Waits for the process of a test, by the test's parameter; the module's `command` says what is run for it."""
    names = [next(iter(item.callspec.params.values())) for item in request.session.items if item.path == request.path]
    forks.start_parent()
    with ThreadPoolExecutor(SHARE) as pool:
        started: dict[str, Future[forks.Ended]] = {
            name: pool.submit(forks.run, request.module.command(name), tmp_path_factory.mktemp(name), timeout_s=600)
            for name in names
        }
        yield lambda name: started[name].result()
        for future in started.values():
            future.cancel()
