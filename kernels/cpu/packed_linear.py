"""Matrix multiplication by a weight packed for the native kernels."""

from __future__ import annotations

import torch

from kernels.cpu.library import TYPES, Library


class NativeLinear:
    """A weight `[out, in]`, float32 or bfloat16, in panels; sums are float32.

    Attributes:
        handle: Of the packed weight; valid as long as this object.
    """

    __slots__ = ("_library", "_outputs", "handle")

    def __init__(self, library: Library, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Packs a copy; `weight` and `bias` `[out]` are not kept.

        Raises:
            ValueError: A dtype that the kernels do not have.
        """
        if weight.dtype not in TYPES:
            raise ValueError(f"native CPU kernels have no {weight.dtype}; use float32 or bfloat16")
        weight = weight.contiguous()
        bias = None if bias is None else bias.to(weight.dtype).contiguous()
        outputs, inputs = weight.shape
        self._library = library
        self._outputs = outputs
        self.handle: int = library.calls.tandem_linear(
            TYPES[weight.dtype], outputs, inputs, weight.data_ptr(), None if bias is None else bias.data_ptr()
        )

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._library.calls.tandem_linear_free(self.handle)

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """`x @ weight.T + bias`, `[T, in]` -> `[T, out]`, dtype of `x`."""
        return self.multiply(x).to(x.dtype)

    def multiply(self, x: torch.Tensor, norm: torch.Tensor | None = None, eps: float = 0.0) -> torch.Tensor:
        """`rms_norm(x) @ weight.T + bias` in float32; without `norm` (float32 `[in]`) of `x` itself."""
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
