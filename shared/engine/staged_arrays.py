"""Arrays that a step's launches read at fixed addresses, filled on the host and sent to the device in one copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 256
_TORCH_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
}

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array: name, element type, shape. Only the first rows of the last of several travel."""

    name: str
    dtype: npt.DTypeLike
    shape: tuple[int, ...]


class StagedArrays:
    """One copy on the device, several on the host: the host fills the next while the device may still read the last.

    Attributes:
        device: By name, for as long as this lives; what launches and captured graphs read.
    """

    def __init__(self, specs: list[ArraySpec], device: torch.device, *, num_stages: int) -> None:
        offsets, size = [], 0
        for spec in specs:
            offsets.append(size)
            size += -(-int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
        self._last_offset = offsets[-1]
        self._last_row_bytes = int(np.prod(specs[-1].shape[1:])) * np.dtype(specs[-1].dtype).itemsize
        is_pinned = device.type == "cuda"
        self._host = [torch.zeros(size, dtype=torch.uint8, pin_memory=is_pinned) for _ in range(num_stages)]
        self._bytes = torch.zeros(size, dtype=torch.uint8, device=device)
        self.device = {spec.name: _view(self._bytes, spec, at) for spec, at in zip(specs, offsets, strict=True)}
        self._stages = [
            {spec.name: _view(host, spec, at).numpy() for spec, at in zip(specs, offsets, strict=True)}
            for host in self._host
        ]
        self._current = 0

    def next_stage(self) -> dict[str, Array]:
        """Host arrays by name; `send` sends them. The caller sees to it that their last use is over."""
        self._current = (self._current + 1) % len(self._stages)
        return self._stages[self._current]

    def send(self, num_last_rows: int) -> None:
        """Copies the current stage to the device, in stream order; of the last array only its first rows."""
        size = self._last_offset + num_last_rows * self._last_row_bytes
        self._bytes[:size].copy_(self._host[self._current][:size], non_blocking=True)


def _view(memory: torch.Tensor, spec: ArraySpec, offset: int) -> torch.Tensor:
    dtype = np.dtype(spec.dtype)
    size = int(np.prod(spec.shape)) * dtype.itemsize
    return memory[offset : offset + size].view(_TORCH_DTYPES[dtype]).view(spec.shape)
