"""Makes Triton's CPU interpreter trustworthy for these kernels, and a stricter machine than a GPU.

Repaired: bf16 and fp8 arithmetic, casts and `tl.dot` (the stock interpreter computes on the raw bit patterns, or
truncates where the hardware rounds to nearest even), the fnuz encoding of e4m3, which it does not know, and scalars
used as loop bounds under numpy >= 2.4.
Spared, as it took most of the time: patching the whole language at each call of a device function, working out types
and shapes for each result, and watching for overflows that nobody is told of.
Added: a load or store outside every tensor of the launch raises instead of touching foreign memory, and two programs of
one launch that store different bytes to one address raise instead of leaving the later value.

`TRITON_INTERPRET=1` must be set before the kernels are imported and holds for the whole process, so these checks run in
a process of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock

Builder = stock.InterpreterBuilder
Handle = stock.TensorHandle

_FP8 = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5: torch.float8_e5m2,
}
_FP8_VALUES = {
    kind: torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).float().numpy() for kind, dtype in _FP8.items()
}
_NARROW = {kind.name for kind in (tl.bfloat16, *_FP8)}


class MemoryFault(Exception):
    """A kernel read or wrote outside its tensors, or two programs wrote different values to one address."""


class Launch:
    """What the running launch may touch and what it has stored; owned by the patched grid executor."""

    kernel = ""
    starts = np.zeros(0, dtype=np.uint64)
    ends = np.zeros(0, dtype=np.uint64)
    stores: ClassVar[list[tuple[int, np.ndarray, np.ndarray]]] = []
    patched: ClassVar[set[frozenset[str]]] = set()


class Products:
    """How `tl.dot` adds.

    A BLAS orders a row's additions by the shape of the whole. In order, a row is on its own, as in a matrix unit: what
    proofs about bits need, and others need not wait for.
    """

    in_order: ClassVar[bool] = False


def is_narrow(dtype: Any) -> bool:
    return dtype.scalar.name in _NARROW


def decode(data: np.ndarray, dtype: Any) -> np.ndarray:
    """Turn the interpreter's bit patterns of a narrow float into fp32; other dtypes pass through."""
    scalar = dtype.scalar
    if scalar == tl.bfloat16:
        return (np.asarray(data).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if scalar in _FP8:
        return _FP8_VALUES[scalar][np.asarray(data).view(np.uint8)]
    return data


def encode(values: np.ndarray, dtype: Any, *, toward_zero: bool = False) -> np.ndarray:
    """Turn numbers into the interpreter's representation of `dtype`: nearest even; what fp8 cannot hold is NaN."""
    scalar = dtype.scalar
    if scalar == tl.bfloat16:
        wide = np.ascontiguousarray(values, dtype=np.float32)
        bits = wide.view(np.uint32)
        if not toward_zero:
            bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        narrow = (bits >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(wide), np.uint16(0x7FC0), narrow).reshape(np.shape(values))
    if scalar in _FP8:
        wide = torch.from_numpy(np.array(values, dtype=np.float32))
        return wide.to(_FP8[scalar]).view(torch.uint8).numpy().reshape(np.shape(values))
    return np.asarray(values).astype(stock._get_np_dtype(dtype))


def install() -> None:
    """Patch the interpreter of this process. Call once, before the first launch."""
    _repair_arithmetic()
    _repair_loop_bounds()
    _repair_types()
    _spare_repetition()
    _remember_shapes()
    _check_memory()
    _watch_launches()


def _repair_arithmetic() -> None:
    cast, binary = Builder.cast_impl, Builder.binary_op

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        if is_narrow(source.dtype) or is_narrow(dtype):
            return Handle(encode(decode(source.data, source.dtype), dtype), dtype.scalar)
        return cast(self, source, dtype)

    def create_fp_to_fp(self: Any, source: Any, dtype: Any, rounding: Any) -> Any:
        toward_zero = rounding is not None and rounding == stock._ir.ROUNDING_MODE.RTZ
        return Handle(encode(decode(source.data, source.dtype), dtype, toward_zero=toward_zero), dtype.scalar)

    def binary_op(self: Any, left: Any, right: Any, op: Callable[..., Any]) -> Any:
        on_bits = op in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
        if on_bits or not (is_narrow(left.dtype) or is_narrow(right.dtype)):
            return binary(self, left, right, op)
        result = op(decode(left.data, left.dtype), decode(right.data, right.dtype))
        if result.dtype == np.bool_:
            return Handle(result, tl.int1)
        return Handle(encode(result, left.dtype), left.dtype.scalar)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, max_imprecise: Any) -> Any:
        wide = acc.data.dtype
        left, right = decode(a.data, a.dtype).astype(wide), decode(b.data, b.dtype).astype(wide)
        if not Products.in_order:
            return Handle(np.matmul(left, right) + acc.data, acc.dtype.scalar)
        total = acc.data
        for k in range(left.shape[-1]):
            total = total + left[..., :, k : k + 1] * right[..., k : k + 1, :]
        return Handle(total, acc.dtype.scalar)

    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    Builder.binary_op, Builder.create_dot = binary_op, create_dot


def _repair_loop_bounds() -> None:
    patch = stock._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    stock._patch_lang_tensor = patch_lang_tensor


def _repair_types() -> None:
    patch = stock._patch_lang_core

    def patch_lang_core(lang: Any, scope: Any) -> None:
        patch(lang, scope)
        to_ir = lang.dtype.to_ir
        scope.set_attr(lang.dtype, "to_ir", lambda self, builder: self if self in _FP8 else to_ir(self, builder))

    stock._patch_lang_core = patch_lang_core


def _spare_repetition() -> None:
    patch, known = stock._patch_lang, functools.cache(stock._get_np_dtype)  # which makes a table each time

    def np_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else known(scalar)

    @functools.cache
    def languages(fn: Any) -> frozenset[str]:
        return frozenset(value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core)

    def patch_lang(fn: Any) -> Any:
        if languages(fn) in Launch.patched:
            return stock._LangPatchScope()
        Launch.patched.add(languages(fn))
        return patch(fn)

    stock._patch_lang = patch_lang
    stock._get_np_dtype = np_dtype
    # Whether an integer overflowed is worked out with every sum and product, and dropped unless `debug` is set.
    stock.interpreter_builder.options = dataclasses.replace(stock.interpreter_builder.options, sanitize_overflow=False)


def _remember_shapes() -> None:
    make, blocks = tl.block_type.__init__, {}

    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        key = str(element_ty), *(n.value if isinstance(n, tl.constexpr) else n for n in shape)
        if key not in blocks:
            make(self, element_ty, shape)
            blocks[key] = vars(self)
        vars(self).update(blocks[key])

    @functools.cache
    def extent(*shape: int) -> tuple[Any, Any]:
        return tl.tuple([tl.constexpr(n) for n in shape]), tl.constexpr(math.prod(shape))

    def tensor_init(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = extent(*kind.shape) if kind.is_block() else extent()

    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_impl_value(self: Any, left: Any, right: Any) -> Any:
        return (left, right) if left.shape is right.shape else broadcast(self, left, right)

    tl.block_type.__init__, tl.tensor.__init__ = block_init, tensor_init
    TritonSemantic.broadcast_impl_value = broadcast_impl_value
    TritonSemantic.computation_type_impl = functools.cache(TritonSemantic.computation_type_impl)


def _check_memory() -> None:
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def create_masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        _require_inside(self, pointers, mask, "load")
        return load(self, pointers, mask, other, *rest, **named)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        addresses, keep = _require_inside(self, pointers, mask, "store")
        stored = np.broadcast_to(value.data, pointers.data.shape)[keep].ravel()
        x, y, z = self.grid_idx
        program = (x * self.grid_dim[1] + y) * self.grid_dim[2] + z
        Launch.stores.append((program, addresses, stored.view(f"V{stored.dtype.itemsize}").astype("V8")))
        return store(self, pointers, value, mask, *rest, **named)

    Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store


def _require_inside(builder: Any, pointers: Any, mask: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    keep = np.asarray(mask.data).astype(bool)
    addresses = np.asarray(pointers.data)[keep].astype(np.uint64).ravel()
    if addresses.size:
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        owner = np.searchsorted(Launch.starts, addresses, side="right").astype(np.int64) - 1
        bad = (owner < 0) | (addresses + size > Launch.ends[np.maximum(owner, 0)])
        if bad.any():
            where = f"{Launch.kernel}, program {builder.grid_idx}"
            raise MemoryFault(f"{what} out of bounds in {where}: {int(bad.sum())} of {addresses.size} lanes")
    return addresses, keep


def _watch_launches() -> None:
    prepare, call = stock.GridExecutor._init_args_hst, stock.GridExecutor.__call__

    def init_args(self: Any, args: Any, named: Any) -> Any:
        copies, named_copies = prepare(self, args, named)
        bases = [getattr(x, "base", x) for x in (*copies, *named_copies.values())]  # of a tensor descriptor its tensor
        storages = [x.untyped_storage() for x in bases if hasattr(x, "untyped_storage")]
        spans = sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages)
        Launch.starts = np.array([start for start, _ in spans], dtype=np.uint64)
        Launch.ends = np.array([end for _, end in spans], dtype=np.uint64)
        Launch.kernel, Launch.stores = self.fn.__name__, []
        return copies, named_copies

    def run(self: Any, *args: Any, **named: Any) -> Any:
        Launch.patched.clear()
        result = call(self, *args, **named)
        _require_no_race()
        return result

    stock.GridExecutor._init_args_hst, stock.GridExecutor.__call__ = init_args, run


def _require_no_race() -> None:
    stores = [entry for entry in Launch.stores if entry[1].size]
    if not stores:
        return
    programs = np.concatenate([np.full(addresses.size, program) for program, addresses, _ in stores])
    addresses = np.concatenate([entry[1] for entry in stores])
    values = np.concatenate([entry[2] for entry in stores])
    order = np.lexsort((programs, addresses))
    programs, addresses, values = programs[order], addresses[order], values[order]
    clash = (addresses[1:] == addresses[:-1]) & (programs[1:] != programs[:-1]) & (values[1:] != values[:-1])
    if clash.any():
        first = int(np.argmax(clash))
        pair = f"programs {programs[first]} and {programs[first + 1]}"
        raise MemoryFault(f"write race in {Launch.kernel}: {pair} store different values, {int(clash.sum())} addresses")
