"""Never asleep between two looks is sleepless; busy and asleep in turn is not."""

import contextlib
import hashlib
import threading
import time
from pathlib import Path

import pytest

from shared.transfer.sleepless_thread import SleeplessThread

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def task(tmp_path):
    """The only thread of a process; writes what proc(5) would say of it."""
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "comm").write_text("async\n")

    def says(state, sleeps):
        (tmp_path / "7" / "status").write_text(f"Name:\tasync\nState:\t{state}\nvoluntary_ctxt_switches:\t{sleeps}\n")

    return says


def watch_in(tmp_path, name="async"):
    now_s = iter(range(100))
    return SleeplessThread(name, clock=lambda: float(next(now_s)), tasks=tmp_path)


def test_it_counts_from_the_first_look_at_which_the_thread_ran_on(tmp_path, task):
    watch = watch_in(tmp_path)
    seen = []
    for state, sleeps in [("S (sleeping)", 4), *[("R (running)", 5)] * 3, ("R (running)", 6), ("R (running)", 6)]:
        task(state, sleeps)
        seen.append(watch.awake_s())
    assert seen == [0, 0, 1, 2, 0, 1]
    task("S (sleeping)", 6)
    assert watch.awake_s() == 0


def test_no_such_thread_and_a_system_that_does_not_count_are_no_alarm(tmp_path, task):
    assert watch_in(tmp_path).awake_s() == 0  # it has no status yet
    task("R (running)", 5)
    other = watch_in(tmp_path, "another")
    assert [other.awake_s(), other.awake_s()] == [0, 0]
    (tmp_path / "7" / "status").write_text("Name:\tasync\nState:\tR (running)\n")
    uncounted = watch_in(tmp_path)
    assert [uncounted.awake_s(), uncounted.awake_s()] == [0, 0]


@contextlib.contextmanager
def running(name, turn):
    """A thread of that name which takes turn after turn."""
    over = threading.Event()

    def run():
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
        named.set()
        while not over.is_set():
            turn()

    named, thread = threading.Event(), threading.Thread(target=run)
    thread.start()
    named.wait()
    yield
    over.set()
    thread.join()


def test_a_real_thread_that_computes_is_told_from_one_that_waits():
    with running("waits", lambda: time.sleep(0.01)):
        watch = SleeplessThread("waits")
        for _ in range(5):
            time.sleep(0.02)
            assert watch.awake_s() < 0.05
    with running("computes", lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)):  # lets go of the GIL
        watch = SleeplessThread("computes")
        while watch.awake_s() < 0.05:
            time.sleep(0.02)
