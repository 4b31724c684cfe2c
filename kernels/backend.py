"""Chooses the kernels: a name and a device in, one object with every op out."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import structlog
import torch

from kernels.cpu.build import NativeUnavailableError
from kernels.cpu.library import NUMERICS_VERSION, TYPES, Library, default_library
from kernels.cpu.packed_linear import native_linear
from kernels.cpu_torch.packed_linear import packed_linear
from kernels.dense_linear import Linear, dense_linear
from kernels.quantization import Quantization, quantize_weight
from kernels.reference.quantized_linear import QuantizedLinear

log = structlog.get_logger(__name__)

BACKENDS = {
    "reference": "kernels.reference",
    "cpu": "kernels.cpu_torch",
    "native": "kernels.cpu_torch",  # whose whole steps are native; single ops remain torch's
    "triton": "kernels.triton",
}


_NATIVE_KV_DTYPES = frozenset({"float32", "bfloat16", "int8"})


class Ops(Protocol):
    """What a backend's package exports; shapes and dtypes are documented in `kernels.reference`."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root-mean-square normalisation."""
        ...

    def fused_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual addition and normalisation."""
        ...

    def rotary(self, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
        """Rotary position embedding, in place."""
        ...

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """Gated activation."""
        ...

    def write_kv(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Stores keys and values in their cache slots."""
        ...

    def copy_blocks(self, arena: torch.Tensor, sources: torch.Tensor, destinations: torch.Tensor) -> None:
        """Copies whole blocks of the paged cache."""
        ...

    def rotary_write_kv(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """The two before it, in one op."""
        ...

    def paged_attention(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_tables: torch.Tensor,
        query_start: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        scale: float,
        max_query_len: int,
        max_seq_len: int,
    ) -> torch.Tensor:
        """Causal attention over the paged cache."""
        ...


MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], Linear]


@dataclass(frozen=True, slots=True)
class Backend:
    """The kernels of one process.

    Attributes:
        name: Key of `BACKENDS`, for logs and `/version`.
        ops: The ops.
        linear: Makes a matrix multiplication of `(weight [out, in], bias [out] or None)`; may repack or quantize the
            weight, so the caller drops its own reference.
        head: The same for the LM head.
        numerics: Equal where a step's bits are: part of the fingerprint, so that unequal workers never pair.
        kv_dtypes: Names of the element types that the KV cache may have whatever that of the weights is.
        quantization: Of the weights, the head's being `quantization.of_lm_head`.
        library: The native library that computes whole steps; None = a step is made of `ops`.
    """

    name: str
    ops: Ops
    linear: MakeLinear
    head: MakeLinear
    numerics: str = "torch"
    quantization: Quantization = Quantization.NONE
    library: Library | None = None
    kv_dtypes: frozenset[str] = frozenset()


def load_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization = Quantization.NONE,
    numerics: str = "fast",
) -> Backend:
    """Imports a backend; only the chosen one, since triton is absent from CPU images.

    Args:
        name: Key of `BACKENDS`, or "auto": on a CPU "native" where it can be built and has the dtype, else "cpu"; on
            other devices "triton".
        device: Where the tensors will live.
        dtype: Of weights and activations.
        quantization: Of the weights of matrix products.
        numerics: "fast", or "invariant": a token's bits must be the same in every batch and after every chunking.

    Raises:
        ValueError: No such backend, or it cannot run on `device`, or it has no quantized or no invariant products.
        ImportError: The backend's own dependency is missing.
    """
    if name == "auto":
        name = _best_for_cpu(dtype) if device.type == "cpu" else "triton"
    if name not in BACKENDS:
        raise ValueError(f"unknown kernel backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    if name in ("cpu", "native") and device.type != "cpu":
        raise ValueError(f"kernel backend {name!r} cannot run on device {device}")
    if name == "triton" and quantization is not Quantization.NONE:
        raise ValueError(f"quantization {quantization.value} needs backend native, cpu or reference, on a CPU")
    if numerics == "invariant" and name not in ("native", "triton"):
        raise ValueError(f"numerics are invariant in the native and triton backends only, not in {name}")
    ops = cast(Ops, importlib.import_module(BACKENDS[name]))
    if name == "native":  # is invariant as it is
        return _native(ops, quantization)
    if name == "triton":
        return _triton(ops, device, is_invariant=numerics == "invariant")
    linear: MakeLinear = packed_linear if name == "cpu" else dense_linear
    head, numerics = linear, "torch"
    if quantization is not Quantization.NONE:
        linear, head = _quantized(quantization), _quantized(quantization.of_lm_head)
        numerics = f"torch-{quantization.value}"
        log.warning("quantized_without_native_kernels", backend=name, costs="every product expands its weight: slow")
    kv_dtypes = _NATIVE_KV_DTYPES | {"float8_e4m3fn"} if name == "reference" else frozenset()
    return Backend(name=name, ops=ops, linear=linear, head=head, numerics=numerics, kv_dtypes=kv_dtypes)


def _triton(ops: Ops, device: torch.device, *, is_invariant: bool) -> Backend:
    kv_dtypes: frozenset[str] = importlib.import_module("kernels.triton.target").kv_dtypes(device)
    linear: MakeLinear = importlib.import_module("kernels.triton.linear").step_linear
    numerics = "triton"
    if is_invariant:
        ops = cast(Ops, importlib.import_module("kernels.triton.invariant"))
        linear = importlib.import_module("kernels.triton.invariant_linear").invariant_linear
        numerics = "triton-invariant"
    return Backend(name="triton", ops=ops, linear=linear, head=linear, numerics=numerics, kv_dtypes=kv_dtypes)


def _quantized(quantization: Quantization) -> MakeLinear:
    return lambda weight, bias: QuantizedLinear(quantize_weight(weight, quantization), bias)


def _native(ops: Ops, quantization: Quantization) -> Backend:
    try:
        library = default_library()
    except (NativeUnavailableError, OSError) as exc:
        raise ValueError(str(exc)) from exc
    numerics = f"native-{library.isa.name.lower()}-{NUMERICS_VERSION}"
    return Backend(
        name="native",
        ops=ops,
        linear=functools.partial(native_linear, library, quantization),
        head=functools.partial(native_linear, library, quantization.of_lm_head),
        numerics=numerics if quantization is Quantization.NONE else f"{numerics}-{quantization.value}",
        quantization=quantization,
        library=library,
        kv_dtypes=_NATIVE_KV_DTYPES,
    )


def _best_for_cpu(dtype: torch.dtype) -> str:
    if dtype not in TYPES:
        return "cpu"
    try:
        default_library()
    except (NativeUnavailableError, OSError) as exc:
        log.warning("native_kernels_unavailable", reason=str(exc), costs="decode steps take two to three times as long")
        return "cpu"
    return "native"
