"""The next token of every sequence of a batch in one native call: layers, head, choice, log-probabilities."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p

import numpy as np
import torch

from kernels.cpu.decoder_step import DecoderStep
from kernels.cpu.library import Library
from kernels.cpu.packed_linear import NativeLinear
from kernels.cpu.token_logprobs import LogprobArrays, RowLogprobs
from kernels.cpu.token_sampler import ROW, SampleRow

_NO_LOGPROBS = -1


class GeneratorParts(ctypes.Structure):
    """`GeneratorParts` in generate.hpp."""

    _fields_ = (
        ("decoder", c_void_p),
        ("head", c_void_p),
        ("final_norm", c_void_p),
        ("eps", c_float),
        ("hidden", c_int32),
        ("kv_type", c_int32),
        ("kv_layers", c_void_p),
        ("block_stride", c_int64),
        *((name, c_int32) for name in ("block_size", "table_width", "max_rows")),
        *((name, c_void_p) for name in ("token_ids", "positions", "tables", "how", "num_logprobs")),
        ("max_logprobs", c_int32),
        *((name, c_void_p) for name in ("logprobs", "top_ids", "top_logprobs")),
    )


class TokenGenerator:
    """Rows of sequences that decode. A step leaves every row where the next one begins.

    A row's token is the one that `DecoderStep`, the head and `TokenSampler` give one after the other, to the bit. Calls
    do not overlap, nor with those of the decoder.
    """

    def __init__(
        self,
        library: Library,
        decoder: DecoderStep,
        head: NativeLinear,
        final_norm: torch.Tensor,  # float32 [hidden]
        eps: float,
        kv_layers: Sequence[torch.Tensor],
        *,
        max_rows: int,
        max_blocks: int,
        max_logprobs: int,
    ) -> None:
        """Allocates the rows.

        Args:
            library: Whose threads compute.
            decoder: The layers.
            head: Logits of normalised hidden states.
            final_norm: Before the head.
            eps: Of that norm.
            kv_layers: As `DecoderStep` takes them; written by steps.
            max_rows: Sequences at most.
            max_blocks: Of a sequence at most.
            max_logprobs: Likeliest tokens at most, no more than the vocabulary has.
        """
        self._tokens = (c_int64 * max_rows)()
        self._positions = (c_int64 * max_rows)()
        self._tables = np.zeros((max_rows, max_blocks), dtype=np.int32)
        self._how = np.zeros(max_rows, dtype=ROW)
        self._num_logprobs = np.full(max_rows, _NO_LOGPROBS, dtype=np.int32)
        self._logprobs = LogprobArrays(max_rows, max_logprobs)
        cache = decoder.bind(kv_layers)
        kv_type, bases, stride, block_size = cache.arguments
        parts = GeneratorParts(
            decoder.handle,
            head.handle,
            final_norm.data_ptr(),
            eps,
            final_norm.shape[0],
            kv_type,
            ctypes.addressof(bases),
            stride,
            block_size,
            max_blocks,
            max_rows,
            ctypes.addressof(self._tokens),
            ctypes.addressof(self._positions),
            self._tables.ctypes.data,
            self._how.ctypes.data,
            self._num_logprobs.ctypes.data,
            max_logprobs,
            *self._logprobs.addresses,
        )
        self._library = library
        self._kept = (decoder, head, final_norm, cache)  # the native side has their addresses
        self._handle: int = library.calls.tandem_generator(ctypes.byref(parts))

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._library.calls.tandem_generator_free(self._handle)

    def set_row(self, row: int, token_id: int, position: int, how: SampleRow, num_logprobs: int | None = None) -> None:
        """Puts a sequence into a row.

        Args:
            row: Which.
            token_id: The sequence's last token, the one to be computed.
            position: Where that is.
            how: To choose the next one.
            num_logprobs: None, or log-probabilities are wanted, of so many of the likeliest tokens too.
        """
        seed, choice, *rest = how
        self._tokens[row] = token_id
        self._positions[row] = position
        self._how[row] = (seed, choice, 0, *rest)
        self._num_logprobs[row] = _NO_LOGPROBS if num_logprobs is None else num_logprobs

    def set_blocks(self, row: int, first: int, blocks: Sequence[int]) -> None:
        """Writes a row's block table from block `first` on."""
        self._tables[row, first : first + len(blocks)] = blocks

    def __call__(self, count: int) -> list[int]:
        """The next token of each of the first `count` rows; their KV is stored, and the rows have gone on."""
        self._library.calls.tandem_generate(self._handle, self._library.team, count)
        return self._tokens[:count]

    def logprobs(self, counts: list[int]) -> Iterator[RowLogprobs]:
        """Of the tokens that the last call chose: of those rows that want them, in order, with their numbers."""
        return self._logprobs.rows(counts)
