"""Workers get cores of their own where there are enough."""

import os
import shutil
import threading

import pytest

from kernels.cpu.build import COMPILERS, supported_isas
from kernels.cpu.library import Library
from shared.cpu_list import format_cpus, parse_cpus, share_cpus
from shared.errors import ConfigurationError
from shared.worker.cores import Cores

ALLOWED = tuple(sorted(os.sched_getaffinity(0)))


@pytest.mark.parametrize("cpus", [(), (0,), (0, 1, 2), (0, 2, 3, 7)])
def test_lists_are_written_with_ranges(cpus):
    assert format_cpus(cpus) == {(): "", (0,): "0", (0, 1, 2): "0-2", (0, 2, 3, 7): "0,2-3,7"}[cpus]


def test_own_list_is_read_back_and_nothing_means_all():
    assert parse_cpus(format_cpus(ALLOWED)) == parse_cpus("") == ALLOWED


@pytest.mark.parametrize("text", ["a", "0-", "3-1", "100000", "0,,1"])
def test_what_is_no_list_of_usable_cpus_is_refused(text):
    with pytest.raises(ConfigurationError, match="cpus"):
        parse_cpus(text)


def test_parts_are_disjoint_and_a_large_machine_keeps_some_for_the_services():
    parts = share_cpus(tuple(range(64)), 3)
    assert [len(part) for part in parts] == [20, 20, 20]
    assert sorted(cpu for part in parts for cpu in part) == list(range(60))
    assert share_cpus((4, 5), 2) == [(4,), (5,)]


def test_with_fewer_cpus_than_workers_nobody_is_bound():
    assert share_cpus((0, 1), 3) == [(), (), ()]


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
def test_helpers_and_step_thread_are_bound_and_other_threads_are_not():
    before = set(os.listdir("/proc/self/task"))
    library = Library(supported_isas()[0], 3)
    helpers = sorted(set(os.listdir("/proc/self/task")) - before, key=int)
    cores = Cores.of(str(ALLOWED[-1]), 3)
    cores.bind_kernels(library)
    assert [os.sched_getaffinity(int(task)) for task in helpers] == [{ALLOWED[-1]}] * 2
    bound = []
    thread = threading.Thread(target=lambda: (cores.bind_this_thread(), bound.append(os.sched_getaffinity(0))))
    thread.start()
    thread.join()
    assert bound == [{ALLOWED[-1]}]
    assert tuple(sorted(os.sched_getaffinity(0))) == ALLOWED
    assert (str(cores), cores.threads, str(Cores.of("", 0)), Cores.of("", 0).threads) == (
        str(ALLOWED[-1]), 3, "any", len(ALLOWED),
    )  # fmt: skip
