"""What the device can do at most, measured in the same run as the kernels that are held against it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loadtest.gpu.report import Row
from loadtest.gpu.timing import Stopwatch


@dataclass(frozen=True, slots=True)
class Limits:
    """Measured ceilings: TB/s of reading, TB/s of copying (bytes read plus bytes written), TFLOP/s of bf16 products."""

    read: float
    copy: float
    matmul: float


def measure_limits(watch: Stopwatch, *, small: bool) -> tuple[Limits, list[Row]]:
    """Read and copy 4 GiB, multiply two 8192 x 8192 matrices of random bf16."""
    words = torch.randint(1 << 40, (1 << (12 if small else 29),), device=watch.device)
    target = torch.empty_like(words)
    size = 64 if small else 8192
    a = torch.randn(size, size, device=watch.device).bfloat16()
    read_us = watch.microseconds(words.sum)
    copy_us = watch.microseconds(lambda: target.copy_(words))
    matmul_us = watch.microseconds(lambda: a @ a)
    gigabytes = words.numel() * 8 / 1e6
    limits = Limits(gigabytes / read_us, 2 * gigabytes / copy_us, 2 * size**3 / matmul_us / 1e6)
    rows = [
        Row("limits", "read 4 GiB (torch sum)", read_us, limits.read, "TB/s"),
        Row("limits", "copy 4 GiB, read + written", copy_us, limits.copy, "TB/s"),
        Row("limits", "bf16 matrix product, 8192 cubed", matmul_us, limits.matmul, "TFLOP/s"),
    ]
    return limits, rows
