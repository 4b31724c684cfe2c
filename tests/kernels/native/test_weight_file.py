"""Packed weights that processes share: packed once, published whole, gone when nobody uses them."""

import errno
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from kernels.cpu import weight_file as module
from kernels.cpu.weight_file import weight_file

SHARED_MEMORY = Path("/dev/shm")
NBYTES = 5 << 20


@pytest.fixture
def directory():
    if not SHARED_MEMORY.is_dir():
        pytest.skip("no /dev/shm here")
    directory = SHARED_MEMORY / f"tandem-test-{uuid.uuid4().hex}"
    directory.mkdir()
    try:
        with weight_file(directory, "probe", 1):
            pass
    except OSError as exc:
        pytest.skip(f"no huge pages for shared memory here: {exc}")
    yield directory
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()


def names(directory):
    return sorted(file.name.rpartition("-")[2] for file in directory.iterdir())


def in_another_process(directory, key, after=""):
    """Opens the file, prints whether it was complete and its first byte; fills it with 7 otherwise."""
    code = f"""
import os, sys
from pathlib import Path
from kernels.cpu.weight_file import weight_file
with weight_file(Path({str(directory)!r}), {key!r}, {NBYTES}) as file:
    piece = file.allocate({NBYTES})
    print(file.complete, piece[0], flush=True)
    if not file.complete:
        piece[:] = 7
    {after}
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_second_user_maps_what_the_first_packed(directory):
    with weight_file(directory, "a", NBYTES) as file:
        assert not file.complete
        pieces = [file.allocate(1000), file.allocate(64)]
        pieces[0][:] = 1
        pieces[1][:] = 2
    assert pieces[1].ctypes.data - pieces[0].ctypes.data == 1024
    with weight_file(directory, "a", NBYTES) as again:
        assert again.complete
        assert [int(again.allocate(1000)[0]), int(again.allocate(64)[63])] == [1, 2]


def test_other_process_sees_the_weights_and_leaves_them_to_who_still_uses_them(directory):
    with weight_file(directory, "a", NBYTES) as file:
        file.allocate(NBYTES)[:] = 3
    other = in_another_process(directory, "a")
    assert other.communicate(timeout=60)[0].split() == ["True", "3"]
    assert names(directory) == ["a.weights", "lock", "probe.weights"]


def test_last_user_removes_the_file(directory):
    other = in_another_process(directory, "b")
    assert other.communicate(timeout=60)[0].split() == ["False", "0"]
    assert names(directory) == ["lock", "probe.weights"]


def test_crash_while_packing_publishes_nothing_and_the_next_start_cleans_up(directory):
    assert in_another_process(directory, "a", after="os._exit(1)").wait(60) == 1
    assert names(directory) == ["a.packing", "lock", "probe.weights"]
    with weight_file(directory, "b", NBYTES):
        pass
    assert names(directory) == ["b.weights", "lock", "probe.weights"]


def test_failure_while_packing_leaves_no_file(directory):
    with pytest.raises(RuntimeError, match="tensor is missing"), weight_file(directory, "a", NBYTES):
        raise RuntimeError("tensor is missing")
    assert names(directory) == ["lock", "probe.weights"]


def test_full_memory_is_an_error_before_anything_is_packed(directory, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"), weight_file(directory, "a", NBYTES):
        pass
    assert names(directory) == ["lock", "probe.weights"]


def test_kernel_without_huge_pages_for_files_is_an_error_before_anything_is_packed(directory, monkeypatch):
    def refuse(memory):
        raise OSError(errno.EINVAL, "cannot make huge pages")

    monkeypatch.setattr(module, "collapse", refuse)
    with pytest.raises(OSError, match="cannot make huge pages"), weight_file(directory, "a", NBYTES):
        pass
    assert names(directory) == ["lock", "probe.weights"]


def test_file_of_another_size_is_refused(directory):
    with weight_file(directory, "a", NBYTES):
        pass
    with pytest.raises(OSError, match="has 6291456 bytes, expected 2097152"), weight_file(directory, "a", 5):
        pass
