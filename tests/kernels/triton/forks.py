"""Runs modules as `python -m` would, each in a fork of one process that has imported torch, which takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

_FORKS = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, slots=True)
class Command:
    """A module, its arguments, and what its environment has besides ours."""

    module: str
    arguments: list[str]
    environment: dict[str, str]


@dataclass(frozen=True, slots=True)
class Ended:
    """What a process left; `code` is 0 if it succeeded, minus a signal if that ended it."""

    code: int | None
    stdout: str
    stderr: str


def start_parent() -> None:
    """Start the process to fork from. It knows no Triton, which reads the environment when it is imported."""
    _FORKS.set_forkserver_preload(["torch", "pytest"])
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()


def run(command: Command, folder: Path, *, timeout_s: float) -> Ended:
    """Wait for the command to end, kill it after `timeout_s`; its output lies in `folder`."""
    outputs = folder / "stdout", folder / "stderr"
    process = _FORKS.Process(target=_become, args=(command, outputs))
    process.start()
    process.join(timeout_s)
    process.kill()
    process.join()
    return Ended(process.exitcode, *(path.read_text() for path in outputs))


def _become(command: Command, outputs: tuple[Path, Path]) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.update(command.environment)
    sys.argv = [command.module, *command.arguments]
    runpy.run_module(command.module, run_name="__main__", alter_sys=True)
