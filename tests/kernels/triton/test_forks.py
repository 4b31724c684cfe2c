"""Modules that run in forks end as they would in processes of their own."""

from __future__ import annotations

import signal

from tests.kernels.triton import forks


def test_a_module_that_fails_leaves_its_code_and_its_output(tmp_path):
    ended = forks.run(forks.Command("timeit", ["print(3); raise ValueError(7)"], {}), tmp_path, timeout_s=60)
    assert (ended.code, ended.stdout) == (1, "3\n")
    assert "ValueError: 7" in ended.stderr


def test_a_module_has_the_environment_of_its_command(tmp_path):
    command = forks.Command(
        "timeit", ["-n1", "-r1", "import os; print(os.environ['TANDEM_FORKED'])"], {"TANDEM_FORKED": "x"}
    )
    ended = forks.run(command, tmp_path, timeout_s=60)
    assert (ended.code, ended.stdout.splitlines()[0]) == (0, "x")


def test_a_module_that_takes_too_long_is_killed(tmp_path):
    ended = forks.run(forks.Command("timeit", ["import time; time.sleep(1000)"], {}), tmp_path, timeout_s=0.5)
    assert ended.code == -signal.SIGKILL
