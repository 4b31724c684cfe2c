"""What kv_transfer gets of the checksum's kernels: it launches them without Triton, by what the message says."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from shared.errors import ConfigurationError
from shared.worker.checksum_kernels import checksum_kernels
from tests.kernels.triton.offline_compiler import compiled_for


def test_the_message_has_all_that_a_launch_needs():
    with compiled_for("sm_90"):
        kernels = checksum_kernels(70_000)
    assert kernels.programs_per_block == 3  # of 32 KiB each
    assert kernels.scratch_bytes_per_block == 69 * 64  # 8 sums for each chunk of 1,024 bytes
    assert len(kernels.keys) == 48 * 8
    for kernel, pointers, threads in ((kernels.sums, 4, 128), (kernels.fold, 3, 32)):
        assert kernel.binary.startswith(b"\x7fELF")
        assert kernel.name.encode() in kernel.binary
        assert kernel.threads == threads
        assert kernel.num_parameters == pointers + 2  # Triton's own come last


@pytest.mark.parametrize("size", [240, 1001])
def test_blocks_of_a_size_without_a_checksum_are_refused(size):
    with pytest.raises(ConfigurationError, match=f"{size} bytes: it must have 248 or more, and a multiple of 8"):
        checksum_kernels(size)
