"""Tests whose work is a process each: in one process of tests their processes run side by side, one per core."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.kernels.triton import forks

AHEAD = 0 if "PYTEST_XDIST_WORKER" in os.environ else os.cpu_count() or 1
"""How many to begin before their tests ask: none where several processes of tests divide the tests among them."""


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], forks.Ended]]:
    """Waits for the process of a test, by the test's parameter; the module's `command` says what is run for it."""
    forks.start_parent()

    def run(name: str) -> forks.Ended:
        return forks.run(request.module.command(name), tmp_path_factory.mktemp(name), timeout_s=600)

    if not AHEAD:
        yield run
        return
    names = [next(iter(item.callspec.params.values())) for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(AHEAD) as pool:
        started: dict[str, Future[forks.Ended]] = {name: pool.submit(run, name) for name in names}
        yield lambda name: started[name].result()
        for future in started.values():
            future.cancel()
