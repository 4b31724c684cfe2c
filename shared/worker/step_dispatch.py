"""Carries each step's outputs from the step thread to the event loop, once per step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shared.engine.step import StepOutputs


class StepDispatch:
    """`on_step` is what the engine calls; the listeners run on the loop, in the order they were added."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._listeners: list[Callable[[StepOutputs], None]] = []

    def add_listener(self, listener: Callable[[StepOutputs], None]) -> None:
        """Adds a callback; it must not block."""
        self._listeners.append(listener)

    def on_step(self, outputs: StepOutputs) -> None:
        """Called from the step thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: StepOutputs) -> None:
        for listener in self._listeners:
            listener(outputs)
