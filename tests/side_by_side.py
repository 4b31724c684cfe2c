"""How `make test` runs tests side by side: in processes of their own (pytest-xdist), file by file.

End-to-end tests mostly wait for services that they started, the others compute: one of the former beside one of the
latter keeps two cores busy, and no two suites are ever under load at once. So one process is given whatever starts
suites, in order, so that most share one; the others are given all other files; who is done helps with the rest.

Plain `pytest` runs everything in one process; nothing of this has any effect there.
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

STARTS_SUITES = ("tests/e2e/", "tests/chaos/", "tests/services/cli/test_real_cluster.py")
TEST_BY_TEST = ("tests/kernels/triton/test_triton_resources.py", "tests/kernels/triton/test_triton_in_interpreter.py")
"""Files whose tests are a process each, which any process of tests may start; begun first, the longest before the
others, so that no core waits for them in the end."""


class EndToEndBesideTheRest(LoadScopeScheduling):
    """Work is a queue of scopes: one of all end-to-end tests, one of each other file or of each of its long tests."""

    END_TO_END = "end to end"

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(STARTS_SUITES):
            return self.END_TO_END
        return nodeid if nodeid.startswith(TEST_BY_TEST) else nodeid.partition("::")[0]

    def _assign_work_unit(self, node: WorkerController) -> None:
        takes_end_to_end = node is self.nodes[0]

        def late(scope: str) -> tuple[bool, list[bool]]:
            return (scope == self.END_TO_END) != takes_end_to_end, [not scope.startswith(file) for file in TEST_BY_TEST]

        self.workqueue.move_to_end(min(self.workqueue, key=late), last=False)
        super()._assign_work_unit(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> EndToEndBesideTheRest:
    return EndToEndBesideTheRest(config, log)
