"""The C interface of the compiled library, through ctypes; a call releases the GIL for as long as it computes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from enum import Enum

import torch

from kernels.cpu.build import Isa, build, supported_isas
from kernels.cpu.weight_memory import WeightMemory

TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Of embeddings."""

NUMERICS_VERSION = 3
"""Raised when a change of the sources changes a result's bits on any instruction set: workers of two versions do not
exchange KV then."""

KV_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""Of the KV cache; `KvType` in kv_layer.hpp."""


class Format(Enum):
    """Of packed weights; `Format` in formats.hpp, which describes them."""

    F32 = 0
    BF16 = 1
    INT8 = 2
    INT4 = 3


class Batch(ctypes.Structure):
    """The step's sizes and arrays; `Batch` in attention.hpp."""

    _fields_ = (
        ("num_tokens", c_int),
        ("num_sequences", c_int),
        ("table_width", c_int),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("tables", c_void_p),
        ("query_start", c_void_p),
        ("seq_lens", c_void_p),
    )


class DecoderShape(ctypes.Structure):
    """`DecoderShape` in decoder.hpp."""

    _fields_ = (
        *((name, c_int32) for name in ("hidden", "heads", "kv_heads", "head_dim", "num_layers")),
        ("eps", c_float),
        ("scale", c_float),
        ("type", c_int32),
    )


class LayerPointers(ctypes.Structure):
    """`LayerPointers` in decoder.hpp."""

    _fields_ = tuple(
        (name, c_void_p)
        for name in (
            "attention_norm",
            "qkv",
            "query_norm",
            "key_norm",
            "output",
            "feed_forward_norm",
            "gate_up",
            "down",
        )
    )


_P, _I, _L, _F = c_void_p, c_int, c_int64, c_float
SIGNATURES: dict[str, tuple[type | None, tuple[object, ...]]] = {
    "tandem_team": (_P, (_I,)),
    "tandem_team_place": (None, (_P, POINTER(c_int), _I, _I)),
    "tandem_team_free": (None, (_P,)),
    "tandem_packed_bytes": (_L, (_I, _I, _I)),
    "tandem_pack": (None, (_P, _I, _I, _I, _P, _I, _P, _P)),
    "tandem_linear": (_P, (_I, _I, _I, _P)),
    "tandem_linear_free": (None, (_P,)),
    "tandem_multiply": (None, (_P, _P, _P, _P, _F, _I, _P)),
    "tandem_rms_norm": (None, (_P, _P, _I, _I, _F, _P)),
    "tandem_silu_and_mul": (None, (_P, _I, _I, _P)),
    "tandem_paged_attention": (None, (_P, _I, _P, _L, _I, _I, _I, POINTER(Batch), _P, _I, _F, _P)),
    "tandem_sample": (None, (_P, _P, _I, _L, _P, _P)),
    "tandem_logprobs": (None, (_P, _P, _I, _L, _P, _P, _I, _P, _P, _P)),
    "tandem_write_kv": (None, (_I, _P, _L, _I, _I, _I, _I, _P, _P, _P)),
    "tandem_decoder": (_P, (POINTER(DecoderShape), POINTER(LayerPointers), _P, _P)),
    "tandem_decoder_free": (None, (_P,)),
    "tandem_generator": (_P, (_P,)),
    "tandem_generator_free": (None, (_P,)),
    "tandem_generate": (None, (_P, _P, _I)),
    "tandem_decoder_step": (_I, (_P, _P, POINTER(Batch), _P, _I, POINTER(c_void_p), _L, _I, _P, _P)),
}


class Library:
    """The library of one instruction set and its team of threads.

    Attributes:
        isa: What it was compiled for.
        calls: The C functions.
        team: Handle of the threads; they sleep between calls.
        weight_memory: Where weights are packed that no other process shares.
    """

    def __init__(self, isa: Isa, num_threads: int) -> None:
        """Loads the library, compiling it if need be.

        Raises:
            NativeUnavailableError: It cannot be built.
        """
        self.isa = isa
        self.calls = ctypes.CDLL(str(build(isa)))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(self.calls, name)
            function.restype, function.argtypes = result, arguments
        self.weight_memory = WeightMemory()
        self.team: int = self.calls.tandem_team(num_threads)

    def place(self, cpus: Sequence[int], *, spins: bool) -> None:
        """Binds the helper threads, not the caller's: to a core each if there is one for every thread, else to all.

        Args:
            cpus: Numbers as Linux has them, the caller's first.
            spins: A thread that waits for others polls some microseconds before it sleeps.
        """
        self.calls.tandem_team_place(self.team, (c_int * len(cpus))(*cpus), len(cpus), spins)

    def __del__(self) -> None:
        if hasattr(self, "team"):
            self.calls.tandem_team_free(self.team)


@functools.cache
def default_library() -> Library:
    """The best instruction set of this machine on as many threads as torch uses when first asked."""
    return Library(supported_isas()[0], torch.get_num_threads())
