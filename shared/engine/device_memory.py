"""How much of a device's memory is left for KV: measured, not guessed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from shared.errors import ConfigurationError
from shared.kv_arena import KvLayout

_CAPTURED_STEP_BYTES = 3 << 20
"""Of one captured step, beside the memory that all share: launches and their arguments, in the driver."""
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What a device's memory goes to, in bytes.

    Attributes:
        total: Of the device.
        utilization: Part of it that this worker may fill, in (0, 1].
        weights: Allocated when the model was loaded.
        activations: Peak of the largest step beyond the weights.
        captured: Set aside for captured steps.
        free: Of the device, when the rest was measured: less than the worker's part where others took theirs first.
    """

    total: int
    utilization: float
    weights: int
    activations: int
    captured: int
    free: int

    @property
    def left(self) -> int:
        """For the KV cache; negative if the rest does not fit."""
        own = int(self.total * self.utilization) - self.weights - self.activations - self.captured
        return min(own, self.free - self.captured)

    def num_blocks(self, layout: KvLayout) -> int:
        """KV blocks that fit.

        Raises:
            ConfigurationError: Not even one, said with all the sums.
        """
        count = self.left // layout.block_bytes
        if count < 1:
            raise ConfigurationError(
                f"the model does not fit: {self.utilization:.0%} of the device's {_gib(self.total)} are "
                f"{_gib(int(self.total * self.utilization))}, {_gib(self.free)} are free beside weights of "
                f"{_gib(self.weights)} and activations of {_gib(self.activations)}; with {_gib(self.captured)} for "
                f"captured steps that leaves {_gib(self.left)} for the KV cache, one block of which takes "
                f"{layout.block_bytes / (1 << 20):.2f} MiB"
            )
        return count


def measure_device_memory(
    device: torch.device, run_largest: Callable[[], None], *, num_captured: int, utilization: float
) -> DeviceMemory:
    """Runs the largest step and reads what it took; the model must be loaded and nothing else be running.

    Args:
        device: A CUDA device.
        run_largest: One step of the largest size.
        num_captured: Steps that will be captured. They share memory for activations, as much again as one step's.
        utilization: See `DeviceMemory`.
    """
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run_largest()
    torch.cuda.synchronize(device)
    activations = torch.cuda.max_memory_allocated(device) - weights
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(
        total=total,
        utilization=utilization,
        weights=weights,
        activations=activations,
        captured=activations + num_captured * _CAPTURED_STEP_BYTES,
        free=free,
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
