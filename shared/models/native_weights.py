"""A checkpoint's matrices as the native kernels want them: packed here, or mapped as another worker packed them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import structlog
import torch

from kernels.cpu.build import SOURCE
from kernels.cpu.library import Library
from kernels.cpu.packed_linear import NativeLinear, format_of, pack, packed_bytes
from kernels.cpu.weight_file import weight_file
from kernels.cpu.weight_memory import ALIGNMENT, Bytes
from kernels.quantization import Quantization
from shared.models.fingerprint import checkpoint_digest

log = structlog.get_logger(__name__)

ReadWeight = Callable[[], tuple[torch.Tensor, torch.Tensor | None]]
"""Gives weight `[out, in]` and bias `[out]` or None; called only if they must be packed."""

MakePacked = Callable[[tuple[int, int], ReadWeight], NativeLinear]
"""Makes a matrix multiplication of a shape `(out, in)`."""


class _Memory(Protocol):
    complete: bool

    def allocate(self, nbytes: int) -> Bytes: ...


class NativeWeights:
    """Packs the parts of a model: what workers have in common is the body, and the head of those that sample."""

    def __init__(self, library: Library, checkpoint: Path, dtype: torch.dtype, share_in: Path | None) -> None:
        """Touches nothing yet.

        Args:
            library: Whose kernels multiply.
            checkpoint: Names the weights.
            dtype: Of the model, and of weights that are not quantized.
            share_in: Directory in shared memory for what workers share; None = every worker packs its own.
        """
        self._library = library
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._share_in = share_in

    @contextmanager
    def part(self, name: str, quantization: Quantization, shapes: Sequence[tuple[int, int]]) -> Iterator[MakePacked]:
        """Makes the part's products, in the order of `shapes`, all inside the block; blocks while another worker packs.

        Args:
            name: Of the part.
            quantization: Of its weights.
            shapes: `(out, in)` of all of them.
        """
        form = format_of(self._dtype, quantization)
        sizes = (packed_bytes(self._library, form, *shape) for shape in shapes)
        nbytes = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
        with ExitStack() as stack:
            memory: _Memory = self._library.weight_memory
            if self._share_in is not None:
                try:
                    memory = stack.enter_context(weight_file(self._share_in, self._key(name, quantization), nbytes))
                    log.info("weights_shared", part=name, mib=nbytes >> 20, packed_already=memory.complete)
                except OSError as exc:
                    costs = f"{nbytes >> 20} MiB for every worker instead of once"
                    log.warning("weights_not_shared", part=name, reason=str(exc), costs=costs)
            yield functools.partial(self._make, memory, quantization)

    def _make(
        self, memory: _Memory, quantization: Quantization, shape: tuple[int, int], read: ReadWeight
    ) -> NativeLinear:
        form = format_of(self._dtype, quantization)
        packed = memory.allocate(packed_bytes(self._library, form, *shape))
        if not memory.complete:
            pack(self._library, *read(), quantization, packed)
        return NativeLinear(self._library, form, *shape, packed)

    def _key(self, part: str, quantization: Quantization) -> str:
        """Equal where the packed bytes are: same weights, element types, rounding and layout."""
        digest = hashlib.blake2b(checkpoint_digest(self._checkpoint), digest_size=12)
        digest.update(f"{part} {self._dtype} {quantization.value}".encode())
        for source in ("formats.hpp", "pack.hpp", "quantize.hpp"):
            digest.update((SOURCE / source).read_bytes())
        return f"{part}-{digest.hexdigest()}"
