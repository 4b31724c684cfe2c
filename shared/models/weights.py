"""Reads the tensors of a safetensors checkpoint, in one file or sharded, mapped rather than loaded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from shared.errors import ConfigurationError
from shared.models.safetensors_files import checkpoint_files

Progress = Callable[[int, int], None]
"""Called with (done, total); bytes for loading, shapes for warm-up."""


class Checkpoint:
    """Open safetensors files, by tensor name. A context manager: tensors taken from it stay valid after it closes.

    Attributes:
        directory: For error messages.
    """

    def __init__(self, directory: Path, progress: Progress | None = None) -> None:
        """Opens every file and reads its header.

        Raises:
            ConfigurationError: A file is missing, truncated or not safetensors.
        """
        self.directory = directory
        self._progress = progress
        self._stack = ExitStack()
        self._holders: dict[str, Any] = {}
        self._done_bytes = 0
        files = checkpoint_files(directory)
        self._total_bytes = sum(file.stat().st_size for file in files)
        for file in files:
            try:
                handle = self._stack.enter_context(safe_open(file, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as exc:
                self._stack.close()
                raise ConfigurationError(f"{file}: not a readable safetensors file: {exc}") from exc
            self._holders.update((str(name), handle) for name in list(handle.keys()))
        self._unused = set(self._holders)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor as stored: on the CPU, read-only in effect (it may be a view of the mapped file).

        Raises:
            ConfigurationError: It is missing or has another shape.
        """
        holder = self._holders.get(name)
        if holder is None:
            raise ConfigurationError(f"{self.directory}: tensor {name} is missing")
        tensor: torch.Tensor = holder.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ConfigurationError(f"{self.directory}: tensor {name} is {tuple(tensor.shape)}, expected {shape}")
        self._unused.discard(name)
        self._done_bytes += tensor.nbytes
        if self._progress is not None:
            self._progress(min(self._done_bytes, self._total_bytes), self._total_bytes)
        return tensor

    def unused(self) -> list[str]:
        """Names of the tensors that nobody asked for, sorted."""
        return sorted(self._unused)
