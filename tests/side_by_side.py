"""How `make test` runs tests side by side: in processes of their own (pytest-xdist), file by file.

End-to-end tests mostly wait for services that they started, the others compute: one of the former beside one of the
latter keeps two cores busy, and no two suites are ever under load at once. So one process is given the end-to-end
tests, in order, so that they share their suite; the others are given all other files; who is done helps with the rest.

A test marked `alone` compares times: it waits until no other process is in a test, and none begins one meanwhile.
Plain `pytest` runs everything in one process; nothing of this has any effect there.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

END_TO_END = "tests/e2e"
LONGEST = ("tests/kernels/triton/", "tests/chaos/")
"""Begun first, so that no core waits for them in the end."""

_turns_dir = pytest.StashKey[TemporaryDirectory[str]]()
_turns = pytest.StashKey["Turns"]()


class EndToEndBesideTheRest(LoadScopeScheduling):
    """Work is a queue of scopes: one of all end-to-end tests, one of each other file."""

    def _split_scope(self, nodeid: str) -> str:
        return END_TO_END if nodeid.startswith(f"{END_TO_END}/") else nodeid.partition("::")[0]

    def _assign_work_unit(self, node: WorkerController) -> None:
        takes_end_to_end = node is self.nodes[0]

        def late(scope: str) -> tuple[bool, bool]:
            return (scope == END_TO_END) != takes_end_to_end, not scope.startswith(LONGEST)

        self.workqueue.move_to_end(min(self.workqueue, key=late), last=False)
        super()._assign_work_unit(node)


class Turns:
    """Lets tests run at once, or one of them alone; shared between processes by two locked files.

    Args:
        directory: Of the files, the same for all processes.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextlib.contextmanager
    def taken(self, *, alone: bool) -> Iterator[None]:
        """Blocks until it may begin: whoever waits to be alone holds the door, so that nobody overtakes it."""
        with (self._directory / "running").open("w") as running:
            with (self._directory / "door").open("w") as door:
                fcntl.flock(door, fcntl.LOCK_EX)
                fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> EndToEndBesideTheRest:
    return EndToEndBesideTheRest(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: WorkerController) -> None:
    stash = node.config.stash
    if _turns_dir not in stash:
        stash[_turns_dir] = TemporaryDirectory(prefix="tandem-tests-")
    node.workerinput["turns"] = stash[_turns_dir].name


def pytest_configure(config: pytest.Config) -> None:
    if worker_input := getattr(config, "workerinput", None):
        config.stash[_turns] = Turns(Path(worker_input["turns"]))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    """Around all of a test, and outside of its time-out."""
    if _turns not in item.config.stash:
        return (yield)
    with item.config.stash[_turns].taken(alone=item.get_closest_marker("alone") is not None):
        return (yield)
