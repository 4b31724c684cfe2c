"""Times device work: medians over repeats, replayed from a CUDA graph so that the host is not what is measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


class Stopwatch:
    """Times callables on one device. On a CPU (a dry run) it runs each once and its numbers mean nothing.

    Attributes:
        device: "cuda" or "cpu".
    """

    def __init__(self, device: str, repeats: int = 20) -> None:
        self.device = device
        self._repeats = repeats

    def microseconds(self, work: Callable[[], object]) -> float:
        """Return the median time of one call, launch gaps included."""
        if self.device == "cpu":
            start = time.perf_counter()
            work()
            return (time.perf_counter() - start) * 1e6
        self._warm_up(work)
        return statistics.median(self._events(work) for _ in range(self._repeats))

    def graph_microseconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """Return the median time per call of the calls captured together in one CUDA graph.

        Give calls on different data (layers of an arena, say), so that the replay does not find it in the L2 cache.
        """
        if self.device == "cpu":
            return statistics.mean(self.microseconds(call) for call in calls)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return self.microseconds(graph.replay) / len(calls)

    def _warm_up(self, work: Callable[[], object]) -> None:
        """Work for a tenth of a second: compiling leaves the device idle, and its clocks are slow to come back."""
        until = time.perf_counter() + 0.1
        while time.perf_counter() < until:
            work()
            torch.cuda.synchronize()

    def _events(self, work: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3
