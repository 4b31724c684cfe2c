"""How steps pass between the engine and whoever computes them, one at a time or overlapped.

A runner on a device of its own takes step n + 1 while it computes step n, so that the device never waits for the host:

    host    schedule n+1 | launch n+1 | result n: update, deliver | schedule n+2 | launch n+2 | ...
    device  ......... step n ........ | .............. step n+1 ................ | ... step n+2

The tokens that step n samples are the input of step n + 1 and stay on the device; the host learns them a step later.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from shared.engine.step import StepBatch, StepResult


class Runner(Protocol):
    """Runs the model, one step at a time."""

    def execute(self, batch: StepBatch) -> StepResult:
        """One forward pass; reads the sequences, changes none."""
        ...


class LaunchedStep(Protocol):
    """A step that is being computed."""

    def result(self) -> StepResult:
        """Blocks until the step is over. Steps end in the order in which they were launched."""
        ...


@runtime_checkable
class PipelinedRunner(Protocol):
    """Runs the model, and takes the next step before it has ended the last."""

    @property
    def max_in_flight(self) -> int:
        """Steps that may be launched and not yet ended, at least 1."""
        ...

    def launch(self, batch: StepBatch) -> LaunchedStep:
        """Starts a forward pass. Reads the sequences before it returns and not afterwards, changes none.

        A token id of `PENDING_TOKEN` is the one that the step launched before samples for the same sequence.
        """
        ...


class _Done:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


class OneStepAtATime:
    """A plain runner, launched: each step is over when `launch` returns."""

    max_in_flight = 1

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def launch(self, batch: StepBatch) -> LaunchedStep:
        """Computes the step."""
        return _Done(self._runner.execute(batch))
