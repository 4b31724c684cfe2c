"""All layers of a decoder in one native call."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.cpu.library import KV_TYPES, TYPES, Batch, DecoderShape, LayerPointers, Library
from kernels.cpu.packed_linear import NativeLinear
from kernels.reference.quantized_kv import SCALE_BYTES


@dataclass(frozen=True, slots=True)
class NativeLayer:
    """One layer's weights; norms `[hidden]`, head norms `[head_dim]` or None."""

    attention_norm: torch.Tensor
    qkv: NativeLinear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: NativeLinear
    feed_forward_norm: torch.Tensor
    gate_up: NativeLinear
    down: NativeLinear


@dataclass(frozen=True, slots=True)
class BoundCache:
    """A cache as the native call takes it; holds on to the tensors, so that their addresses stay theirs.

    Attributes:
        arguments: Type, base addresses of the layers, bytes from block to block, block size.
    """

    layers: Sequence[torch.Tensor]
    arguments: tuple[int, ctypes.Array[ctypes.c_void_p], int, int]


@dataclass(frozen=True, slots=True)
class _BoundBatch:
    """The arrays of a step as the native call takes them; steps of one shape mostly come in the same tensors."""

    tensors: tuple[torch.Tensor, ...]
    batch: Batch


class StepGivenUp(Exception):
    """Nobody wanted a step any more, and it ended early: what it was to store is partly there."""


class DecoderStep:
    """A decoder's layers. Calls do not overlap: intermediate buffers belong to the object.

    Attributes:
        handle: Of the native object; valid as long as this one.
    """

    def __init__(
        self,
        library: Library,
        layers: Sequence[NativeLayer],
        *,
        embedding: torch.Tensor,  # [vocab, hidden]
        cos_sin: torch.Tensor,  # float32 [max_positions, head_dim]
        num_heads: int,
        num_kv_heads: int,
        eps: float,
    ) -> None:
        self._library = library
        self._cache: BoundCache | None = None
        self._bound = _BoundBatch((), Batch())
        self._hidden = embedding.shape[1]
        head_dim = cos_sin.shape[1]
        self._cache_shape = (num_kv_heads, head_dim)
        self._kept: list[object] = [embedding, cos_sin, *layers]
        pointers = (LayerPointers * len(layers))(*(self._pointers(layer) for layer in layers))
        shape = DecoderShape(
            self._hidden,
            num_heads,
            num_kv_heads,
            head_dim,
            len(layers),
            eps,
            head_dim**-0.5,
            TYPES[embedding.dtype],
        )
        self.handle: int = library.calls.tandem_decoder(
            ctypes.byref(shape), pointers, embedding.data_ptr(), cos_sin.data_ptr()
        )

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._library.calls.tandem_decoder_free(self.handle)

    def __call__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        block_tables: torch.Tensor,
        query_start: torch.Tensor,
        seq_lens: torch.Tensor,
        kv_layers: Sequence[torch.Tensor],
        unwanted: ctypes.c_int32 | None = None,
    ) -> torch.Tensor:
        """Computes a step and stores its keys and values.

        Args:
            token_ids: int64 `[T]`.
            positions: int64 `[T]`.
            slot_mapping: int64 `[T]`; a token of slot -1 is not stored.
            block_tables: int32 `[S, max_blocks]`, any row stride.
            query_start: int32 `[S + 1]`.
            seq_lens: int32 `[S]`.
            kv_layers: Per layer `[num_blocks, 2, block_size, num_kv_heads, head_dim]`, float32, bfloat16, or int8 with
                scales as in `kernels.reference.quantized_kv`; mutated.
            unwanted: Looked at before each layer: another thread makes it other than 0 to end the step early.

        Returns:
            New float32 `[T, hidden]`, before the final norm.

        Raises:
            StepGivenUp: It ended early.
        """
        cache = self._cache
        if cache is None or kv_layers is not cache.layers:
            cache = self._cache = self.bind(kv_layers)
        hidden = torch.empty(token_ids.shape[0], self._hidden)
        tensors = (token_ids, positions, slot_mapping, block_tables, query_start, seq_lens)
        if len(self._bound.tensors) != len(tensors) or not all(map(operator.is_, tensors, self._bound.tensors)):
            self._bound = _BoundBatch(tensors, batch_of(*tensors[1:]))
        is_whole = self._library.calls.tandem_decoder_step(
            self.handle,
            self._library.team,
            ctypes.byref(self._bound.batch),
            token_ids.data_ptr(),
            *cache.arguments,
            hidden.data_ptr(),
            ctypes.addressof(unwanted) if unwanted is not None else None,
        )
        if not is_whole:
            raise StepGivenUp
        return hidden

    def bind(self, kv_layers: Sequence[torch.Tensor]) -> BoundCache:
        """What calls say of a cache: the same at every step, and slow to ask every layer for.

        Raises:
            ValueError: It is not of the model's shape.
        """
        first = kv_layers[0]
        heads, width = self._cache_shape
        row = (heads, width + SCALE_BYTES if first.dtype == torch.int8 else width)
        if first.dtype not in KV_TYPES or first.shape[3:] != row or first.stride(3) != first.shape[4]:
            raise ValueError(f"KV cache {tuple(first.shape)} of {first.dtype} does not fit the model")
        bases = (ctypes.c_void_p * len(kv_layers))(*(layer.data_ptr() for layer in kv_layers))
        stride = first.stride(0) * first.element_size()
        return BoundCache(kv_layers, (KV_TYPES[first.dtype], bases, stride, first.shape[2]))

    def _pointers(self, layer: NativeLayer) -> LayerPointers:
        """Norms are widened once and kept here."""

        def wide(norm: torch.Tensor | None) -> int | None:
            if norm is None:
                return None
            kept = norm.float().contiguous()
            self._kept.append(kept)
            return kept.data_ptr()

        return LayerPointers(
            wide(layer.attention_norm),
            layer.qkv.handle,
            wide(layer.query_norm),
            wide(layer.key_norm),
            layer.output.handle,
            wide(layer.feed_forward_norm),
            layer.gate_up.handle,
            layer.down.handle,
        )


def batch_of(
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
) -> Batch:
    """The C view of a step; valid while the tensors live."""
    return Batch(
        positions.shape[0],
        seq_lens.shape[0],
        block_tables.stride(0),
        positions.data_ptr(),
        slot_mapping.data_ptr(),
        block_tables.data_ptr(),
        query_start.data_ptr(),
        seq_lens.data_ptr(),
    )
