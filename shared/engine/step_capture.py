"""Records the launches of a step once, so that the device repeats them without the host.

On a CPU there is nothing to record: a captured step is the function itself, and all else stays the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

Run = Callable[[], torch.Tensor]


class Replay(Protocol):
    """A step that can be repeated. Its inputs are read, and its outputs written, where they were when it was made."""

    def __call__(self) -> torch.Tensor:
        """Repeats the step in stream order; the result is valid until any captured step is repeated."""
        ...


class StepCapture(Protocol):
    """Makes replays."""

    def capture(self, run: Run) -> Replay:
        """Runs the step once, so that everything it needs is compiled, and records it."""
        ...


class NoCapture:
    """For devices whose work the host does itself."""

    def capture(self, run: Run) -> Replay:
        """Runs the step and returns it."""
        run()
        return run


class CudaCapture:
    """CUDA graphs that share one pool of memory: of all captured steps only one is under way at a time."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, run: Run) -> Replay:
        """Runs the step, then records it; waits for the device."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool)
            try:
                result = _borrowed(run())
            finally:
                graph.capture_end()
        return _GraphReplay(graph, result)


class _GraphReplay:
    def __init__(self, graph: torch.cuda.CUDAGraph, result: torch.Tensor) -> None:
        self._graph = graph
        self._result = result

    def __call__(self) -> torch.Tensor:
        self._graph.replay()
        return self._result


@dataclass(frozen=True, slots=True)
class _Memory:
    """Device memory as the interface between array libraries describes it."""

    __cuda_array_interface__: dict[str, object]


_UNSIGNED = {1: "|u1", 2: "<u2", 4: "<u4", 8: "<u8"}


def _borrowed(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without a share in its ownership, so that the pool gives it to the next capture as well."""
    interface: dict[str, object] = {
        "shape": tuple(tensor.shape),
        "strides": None,
        "typestr": _UNSIGNED[tensor.element_size()],
        "data": (tensor.data_ptr(), False),
        "version": 3,
    }
    assert tensor.is_contiguous(), "the result of a step is contiguous"
    return torch.as_tensor(_Memory(interface), device=tensor.device).view(tensor.dtype)
