"""Rotary position embedding: its settings in a checkpoint and its angular frequencies. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How position turns into angle.

    Attributes:
        theta: Base wavelength.
        kind: "default"; "linear" divides every frequency by `factor`; "llama3" divides the low ones and blends between.
        factor: 1 for "default".
        low_freq_factor, high_freq_factor, original_max_positions: Of "llama3" only: frequencies with a wavelength above
            `original_max_positions / low_freq_factor` are divided, below `... / high_freq_factor` are kept.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0

    def inverse_frequencies(self, head_dim: int) -> npt.NDArray[np.float32]:
        """Radians per position of each pair of dimensions, float32 `[head_dim / 2]`; source: Llama 3.1's reference."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        base: npt.NDArray[np.float32] = (1.0 / np.power(np.float32(self.theta), exponents)).astype(np.float32)
        if self.kind == "default":
            return base
        if self.kind == "linear":
            linear: npt.NDArray[np.float32] = base / np.float32(self.factor)
            return linear
        turns = self.original_max_positions * base / np.float32(2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        blended: npt.NDArray[np.float32] = ((1.0 - kept) * base / self.factor + kept * base).astype(np.float32)
        return blended


def read_rope(raw: dict[str, Any], max_positions: int) -> RopeScaling:
    """Reads both spellings: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling` (before).

    Raises:
        ValueError: A type of scaling that is not supported, or a partial rotation.
        KeyError: A parameter is missing.
    """
    settings = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
    theta = float(settings.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = str(settings.get("rope_type") or settings.get("type") or "default")
    if kind not in SUPPORTED_ROPE_TYPES:
        raise ValueError(f"RoPE type {kind!r} is not supported; supported: {', '.join(SUPPORTED_ROPE_TYPES)}")
    if float(settings.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("partial rotary embedding is not supported")
    if kind == "default":
        return RopeScaling(theta)
    if kind == "linear":
        return RopeScaling(theta, kind, float(settings["factor"]))
    return RopeScaling(
        theta,
        kind,
        float(settings["factor"]),
        float(settings["low_freq_factor"]),
        float(settings["high_freq_factor"]),
        int(settings.get("original_max_position_embeddings") or max_positions),
    )
