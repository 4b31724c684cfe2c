"""The scripts that measure a GPU run to their end where there is none: `check_measurements.py`, in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.triton import forks
from tests.kernels.triton.interpreted import interpreted


@pytest.mark.timeout(660)
def test_the_measurements_run_to_their_end_without_a_gpu(tmp_path):
    forks.start_parent()
    run = forks.run(interpreted(Path(__file__).with_name("check_measurements.py")), tmp_path, timeout_s=600)
    assert run.code == 0, run.stdout[-6000:] + run.stderr[-2000:]
