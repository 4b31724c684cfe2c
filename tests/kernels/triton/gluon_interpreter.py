"""Interprets the warp-specialised kernel, which Triton's interpreter cannot: runs its Python on ordinary tensors.

The roles of a program take turns on one baton, handed over at random wherever they meet: at barriers, copies and
products. What the hardware does on its own happens as late as it may: a copy lands at some time before its barrier
completes, in any order; a matrix product reads shared memory when it is waited for. So a buffer that is reused too
early gives wrong numbers, a barrier that is never completed is found as a hang, and these raise: a load or store
outside its tensor, a product used before it was waited for, and one that reads shared memory written without a fence.
"""

from __future__ import annotations

import random
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from kernels.triton import hopper_work, prefill_hopper_attention
from tests.kernels.triton.interpreter import MemoryFault


class DeviceHang(Exception):
    """Every role waits for another."""


@dataclass
class _Role:
    """One role of a program: a thread that runs only while it holds the baton."""

    number: int
    may_go: Callable[[], bool] | None = None
    baton: threading.Event = field(default_factory=threading.Event)
    products: list[_Product] = field(default_factory=list)
    unfenced: set[int] = field(default_factory=set)
    is_done: bool = False


class _Program:
    """The roles of the running program, the copies under way, and who goes next."""

    def __init__(self, program: int, programs: int) -> None:
        self.program, self.programs = program, programs
        self.random = random.Random(program)
        self.roles: list[_Role] = []
        self.copies: list[Callable[[], None]] = []
        self.error: BaseException | None = None
        self.running: _Role = _Role(-1)
        self._finished = threading.Event()

    def specialize(self, work: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        """Run the roles to their ends."""
        self.roles = [_Role(number) for number in range(len(work))]
        threads = [
            threading.Thread(target=self._play, args=(role, *job), daemon=True)
            for role, job in zip(self.roles, work, strict=True)
        ]
        for thread in threads:
            thread.start()
        self._pass_on()
        self._finished.wait()
        if self.error:
            raise self.error

    def meet(self, may_go: Callable[[], bool] | None = None) -> None:
        """Hand the baton on; come back when it is this role's turn and `may_go`."""
        me = self.running
        me.may_go = may_go
        self._pass_on()
        me.baton.wait()
        me.baton.clear()
        if self.error:
            raise SystemExit

    def _play(self, role: _Role, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        role.baton.wait()
        role.baton.clear()
        try:
            if not self.error:
                function(*arguments)
        except SystemExit:
            return
        except BaseException as error:
            self._fail(error)
            return
        role.is_done = True
        self._pass_on()

    def _pass_on(self) -> None:
        while True:
            ready = [role for role in self.roles if not role.is_done and (role.may_go is None or role.may_go())]
            chosen = self.random.choice([*ready, *self.copies]) if ready or self.copies else None
            if isinstance(chosen, _Role):
                self.running = chosen
                chosen.baton.set()
                return
            if chosen is None:
                if all(role.is_done for role in self.roles):
                    self._finished.set()
                else:
                    stuck = [role.number for role in self.roles if not role.is_done]
                    self._fail(DeviceHang(f"program {self.program}: roles {stuck} wait for each other"))
                return
            self.copies.remove(chosen)
            chosen()

    def _fail(self, error: BaseException) -> None:
        self.error = error
        for role in self.roles:
            role.baton.set()
        self._finished.set()


class _Running:
    """The program that runs now."""

    program: ClassVar[_Program]


class _Barrier:
    """An mbarrier: a phase ends when all have arrived and all announced bytes have."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def expect(self, count: int) -> None:
        self.bytes += count
        self.arrive(1)

    def arrive(self, count: int) -> None:
        self.pending -= count
        self._end_phase()

    def land(self, count: int) -> None:
        self.bytes -= count
        self._end_phase()

    def _end_phase(self) -> None:
        assert self.pending >= 0, "more arrivals than a phase has"
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase ^ 1


class _Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def index(self, index: Any) -> _Shared:
        return _Shared(self.data[int(index)])

    def permute(self, order: Sequence[int]) -> _Shared:
        return _Shared(self.data.permute(*order))

    def store(self, value: torch.Tensor) -> None:
        assert value.dtype == self.dtype
        self.data.copy_(value)
        _Running.program.running.unfenced.add(self.data.untyped_storage().data_ptr())

    def load(self, _layout: None) -> torch.Tensor:
        return self.data.clone()

    def _reinterpret(self, _dtype: torch.dtype, shape: Sequence[int], _layout: None) -> _Pieces:
        return _Pieces(self.data, *(int(n) for n in shape[1:]))


class _Pieces(_Shared):
    """Tiles `[stages, rows, columns]` as they lie in memory: panels of columns, each in runs of rows."""

    def __init__(self, data: torch.Tensor, rows: int, columns: int) -> None:
        super().__init__(data)
        self._rows, self._columns = rows, columns

    def index(self, index: Any) -> _Shared:
        _, rows, columns = self.data.shape
        parts, panels = rows // self._rows, columns // self._columns
        stage, within = divmod(int(index), parts * panels)
        panel, part = divmod(within, parts)
        row, column = part * self._rows, panel * self._columns
        return _Shared(self.data[stage, row : row + self._rows, column : column + self._columns])


class _Barriers:
    def __init__(self, count: int) -> None:
        self._barriers = [_Barrier() for _ in range(count)]

    def index(self, index: Any) -> _Barrier:
        return self._barriers[int(index)]


@dataclass
class _Product:
    """A matrix product in flight."""

    a: Any
    b: _Shared
    acc: torch.Tensor
    value: torch.Tensor | None = None

    def complete(self) -> None:
        left = (self.a.data if isinstance(self.a, _Shared) else self.a).float()
        self.value = self.acc + left @ self.b.data.float()


def _warpgroup_mma(a: Any, b: _Shared, acc: torch.Tensor, *, use_acc: bool = True, is_async: bool) -> _Product:
    assert is_async
    for operand in (a, b):
        if (
            isinstance(operand, _Shared)
            and operand.data.untyped_storage().data_ptr() in _Running.program.running.unfenced
        ):
            raise MemoryFault("a product reads shared memory that was written without a fence")
    product = _Product(a, b, acc if use_acc else torch.zeros_like(acc))
    _Running.program.running.products.append(product)
    _Running.program.meet()
    return product


def _warpgroup_mma_wait(num_outstanding: int, deps: Sequence[Any]) -> Any:
    _Running.program.meet()
    products = _Running.program.running.products
    while len(products) > num_outstanding:
        products.pop(0).complete()
    values = [dep.value if isinstance(dep, _Product) else dep for dep in deps]
    assert all(value is not None for value in values), "a product is used before it was waited for"
    return values[0] if len(values) == 1 else tuple(values)


class _Pointer:
    """A tensor's memory, at offsets of elements."""

    def __init__(self, tensor: torch.Tensor, offsets: Any = 0) -> None:
        self.tensor, self.offsets = tensor, offsets
        self.dtype = types.SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, more: Any) -> _Pointer:
        return _Pointer(self.tensor, self.offsets + more)

    def __radd__(self, more: Any) -> _Pointer:
        return self + more

    def at(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the memory, flat, the offsets in it where `mask`, and the mask in the shape of the offsets."""
        offsets = torch.as_tensor(self.offsets)
        mask = torch.as_tensor(mask).broadcast_to(offsets.shape)
        size = 1 + sum((n - 1) * stride for n, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True))
        used = offsets[mask]
        if used.numel() and (int(used.min()) < 0 or int(used.max()) >= size):
            raise MemoryFault(f"elements {int(used.min())} to {int(used.max())} of a tensor of {size}")
        return self.tensor.as_strided((size,), (1,)), used, mask


def _load(pointer: _Pointer, mask: Any = True, other: Any = 0) -> torch.Tensor:
    memory, used, mask = pointer.at(mask)
    loaded = torch.full(mask.shape, other, dtype=memory.dtype)
    loaded[mask] = memory[used]
    return loaded


def _store(pointer: _Pointer, value: torch.Tensor, mask: Any = True) -> None:
    memory, used, mask = pointer.at(mask)
    memory[used] = value[mask]


def _allocate(dtype: torch.dtype, shape: Sequence[int], _layout: None) -> _Shared | _Barriers:
    if dtype == torch.int64:
        return _Barriers(shape[0])
    return _Shared(torch.full([int(n) for n in shape], float("nan"), dtype=dtype))


def _async_copy(rows: Any, at: Sequence[Any], full: _Barrier, piece: _Shared) -> None:
    row, column = (int(n) for n in at)
    height, width = rows.block_shape
    source = rows.base[row : row + height, column : column + width]
    if source.shape != (height, width):
        raise MemoryFault(f"a copy of rows {row} to {row + height} of {rows.base.shape[0]}")

    def land() -> None:
        piece.data.copy_(source)
        full.land(height * width * source.element_size())

    _Running.program.copies.append(land)
    _Running.program.meet()


def _wait(barrier: _Barrier, phase: Any, pred: Any = True) -> None:
    if pred:
        _Running.program.meet(lambda: barrier.phase != int(phase))


def _arrive(barrier: _Barrier, count: int) -> None:
    barrier.arrive(count)
    _Running.program.meet()


def _pairwise(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))


def _no_layout(*_: Any, **__: Any) -> None:
    return None


_GL = types.SimpleNamespace(
    arange=lambda start, end, _layout: torch.arange(int(start), int(end), dtype=torch.int32),
    zeros=lambda shape, dtype, _layout: torch.zeros([int(n) for n in shape], dtype=dtype),
    full=lambda shape, value, dtype, _layout: torch.full([int(n) for n in shape], value, dtype=dtype),
    where=lambda condition, a, b: torch.where(torch.as_tensor(condition), a, b),
    sum=lambda x, dim: x.sum(dim), max=lambda x, dim: x.amax(dim), min=lambda x, dim: x.amin(dim),
    exp2=torch.exp2, maximum=_pairwise(torch.maximum), minimum=_pairwise(torch.minimum),
    cdiv=lambda a, b: -(-a // b), static_range=range, load=_load, store=_store,
    convert_layout=lambda x, _layout: x, allocate_shared_memory=_allocate,
    num_programs=lambda _axis: _Running.program.programs, program_id=lambda _axis: _Running.program.program,
    warp_specialize=lambda work, _warps, _registers: _Running.program.specialize(work),
    constexpr=None, int32=torch.int32, int64=torch.int64, float32=torch.float32,
    BlockedLayout=_no_layout, SliceLayout=_no_layout, DotOperandLayout=_no_layout,
    NVMMADistributedLayout=_no_layout, NVMMASharedLayout=_no_layout,
)  # fmt: skip
_HARDWARE = {
    "gl": _GL,
    "mbarrier": types.SimpleNamespace(
        init=lambda barrier, count: barrier.init(count), expect=lambda barrier, count: barrier.expect(int(count)),
        arrive=_arrive, wait=_wait, MBarrierLayout=_no_layout,
    ),
    "tma": types.SimpleNamespace(async_copy_global_to_shared=_async_copy),
    "warpgroup_mma": _warpgroup_mma,
    "warpgroup_mma_wait": _warpgroup_mma_wait,
    "fence_async_shared": lambda: _Running.program.running.unfenced.clear(),
}  # fmt: skip


class _Interpreted:
    """Stands in for the kernel: `kernel[grid](...)` runs its programs one after the other."""

    def __init__(self) -> None:
        names: dict[str, Any] = {}
        for module in (hopper_work, prefill_hopper_attention):
            for name, value in vars(module).items():
                if isinstance(getattr(value, "fn", None), types.FunctionType):
                    names[name] = types.FunctionType(value.fn.__code__, names, name)
                elif isinstance(value, hopper_work.gl.constexpr):
                    names[name] = value.value
        self._kernel = names["prefill_hopper_kernel"]
        names.update(_HARDWARE)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def run(*arguments: Any, num_warps: int, **named: Any) -> None:
            assert num_warps == 4
            given = [_Pointer(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            for program in range(grid[0]):
                _Running.program = _Program(program, grid[0])
                self._kernel(*given, **named)

        return run


@contextmanager
def interpreted(processors: int) -> Iterator[None]:
    """Inside, `prefill_hopper_attention` runs here, as on a device of so many multiprocessors."""
    module: Any = prefill_hopper_attention
    kernel, count = module.prefill_hopper_kernel, module.num_processors
    module.prefill_hopper_kernel, module.num_processors = _Interpreted(), lambda device: processors
    try:
        yield
    finally:
        module.prefill_hopper_kernel, module.num_processors = kernel, count
