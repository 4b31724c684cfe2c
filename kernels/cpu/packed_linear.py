"""Matrix multiplication by a weight packed for the native kernels."""

from __future__ import annotations

import torch

from kernels.cpu.library import TYPES, Format, Library
from kernels.cpu.weight_memory import Bytes
from kernels.quantization import Quantization

FORMATS = {torch.float32: Format.F32, torch.bfloat16: Format.BF16}
QUANTIZED_FORMATS = {Quantization.INT8: Format.INT8, Quantization.INT4: Format.INT4}


def format_of(dtype: torch.dtype, quantization: Quantization) -> Format:
    """What weights of a model are packed as.

    Raises:
        ValueError: A dtype that the kernels do not have.
    """
    if dtype not in FORMATS:
        raise ValueError(f"native CPU kernels have no {dtype}; use float32 or bfloat16")
    return FORMATS[dtype] if quantization is Quantization.NONE else QUANTIZED_FORMATS[quantization]


def packed_bytes(library: Library, form: Format, outputs: int, inputs: int) -> int:
    """Size of a packed weight."""
    size: int = library.calls.tandem_packed_bytes(form.value, outputs, inputs)
    return size


def pack(
    library: Library,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    quantization: Quantization,
    packed: Bytes,
) -> None:
    """Packs `weight` `[out, in]`, float32 or bfloat16, and `bias` `[out]` into `packed` of `packed_bytes`.

    Quantizes as `kernels.quantization.quantize_weight` does, to the bit.

    Raises:
        ValueError: A dtype that the kernels do not have.
    """
    outputs, inputs = weight.shape
    form = format_of(weight.dtype, quantization)
    weight = weight.contiguous()
    wide_bias = None if bias is None else bias.float().contiguous()
    library.calls.tandem_pack(
        library.team,
        form.value,
        outputs,
        inputs,
        weight.data_ptr(),
        TYPES[weight.dtype],
        None if wide_bias is None else wide_bias.data_ptr(),
        packed.ctypes.data,
    )


class NativeLinear:
    """A weight `[out, in]` in panels; sums are float32.

    Attributes:
        handle: Of the packed weight; valid as long as this object.
    """

    __slots__ = ("_library", "_outputs", "_packed", "handle")

    def __init__(self, library: Library, form: Format, outputs: int, inputs: int, packed: Bytes) -> None:
        """Wraps what `pack` filled; `packed` is kept."""
        self._library = library
        self._outputs = outputs
        self._packed = packed
        self.handle: int = library.calls.tandem_linear(form.value, outputs, inputs, packed.ctypes.data)

    @property
    def packed_bytes(self) -> int:
        """Bytes that one multiplication reads."""
        return self._packed.nbytes

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._library.calls.tandem_linear_free(self.handle)

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """`x @ weight.T + bias`, `[T, in]` -> `[T, out]`, dtype of `x`."""
        return self.multiply(x).to(x.dtype)

    def multiply(self, x: torch.Tensor, norm: torch.Tensor | None = None, eps: float = 0.0) -> torch.Tensor:
        """`rms_norm(x) @ weight.T + bias` in float32; without `norm` (float32 `[in]`) of `x` itself."""
        if x.dtype is not torch.float32 or not x.is_contiguous():
            x = x.float().contiguous()
        out = torch.empty(x.shape[0], self._outputs)
        self._library.calls.tandem_multiply(
            self._library.team,
            self.handle,
            x.data_ptr(),
            None if norm is None else norm.data_ptr(),
            eps,
            x.shape[0],
            out.data_ptr(),
        )
        return out


def native_linear(
    library: Library, quantization: Quantization, weight: torch.Tensor, bias: torch.Tensor | None
) -> NativeLinear:
    """Packs a copy of `weight` `[out, in]`, float32 or bfloat16, and `bias` `[out]`, into this process's own memory.

    Raises:
        ValueError: A dtype that the kernels do not have.
    """
    outputs, inputs = weight.shape
    form = format_of(weight.dtype, quantization)
    packed = library.weight_memory.allocate(packed_bytes(library, form, outputs, inputs))
    pack(library, weight, bias, quantization, packed)
    return NativeLinear(library, form, outputs, inputs, packed)
