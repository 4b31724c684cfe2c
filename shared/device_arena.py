"""A worker's KV blocks in device memory, shared with its kv_transfer by a CUDA IPC handle.

The worker owns the memory; kv_transfer maps it under an address of its own. A block is then what array libraries take
for device memory, and UCX sends from it and receives into it. CUDA's bindings are imported when they are used: a worker
on a CPU does without.

What outlives a worker. The driver frees a process's memory with the process, so the next life starts with an empty
cache: a drained worker has copied everything to kv_transfer's host tier before, a killed one what it had time for (see
`shared.worker.save_ahead`), and the host tier serves that on, to peers and to the next life. The other way round,
kv_transfer owning the memory, was decided against: UCX may abort its process, and would take the worker's cache, and
with it the worker, along; as it is a crash of the transport costs no KV.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigurationError

HANDLE_BYTES = 64


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as exc:
        raise ConfigurationError(f"device memory is shared through cuda.bindings, which is missing: {exc}") from exc
    return runtime


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a CUDA call.

    Raises:
        ConfigurationError: It failed.
    """
    if int(result[0]) != 0:
        raise ConfigurationError(f"CUDA: {result[0].name}")
    return result[1] if len(result) > 1 else None


def open_device(device: int = 0) -> None:
    """Makes the device usable in this process; before UCX is opened, which looks for devices then.

    Raises:
        ConfigurationError: There is no such device.
    """
    runtime = _runtime()
    _checked(runtime.cudaSetDevice(device))
    _checked(runtime.cudaFree(0))


class DeviceBlock:
    """One block of a `DeviceArena`, as array libraries and UCX see device memory; keeps the mapping alive."""

    __slots__ = ("__cuda_array_interface__", "_arena", "nbytes", "pointer")

    def __init__(self, arena: DeviceArena, pointer: int, nbytes: int) -> None:
        self._arena = arena
        self.pointer = pointer
        self.nbytes = nbytes
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
            "strides": None,
        }

    def read_into(self, target: npt.NDArray[np.uint8]) -> None:
        """Copies the block to the host; blocks until it is there."""
        runtime = _runtime()
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        _checked(runtime.cudaMemcpy(target.ctypes.data, self.pointer, self.nbytes, kind))

    def write_from(self, source: npt.NDArray[np.uint8]) -> None:
        """Copies the block from the host; blocks until it is on the device."""
        runtime = _runtime()
        kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        _checked(runtime.cudaMemcpy(self.pointer, source.ctypes.data, self.nbytes, kind))
        _checked(runtime.cudaStreamSynchronize(0))

    def staging(self) -> npt.NDArray[np.uint8]:
        """A page-locked buffer of the block's size; the calling thread's until its next call."""
        return _staging(self.nbytes)

    def host_copy(self) -> npt.NDArray[np.uint8]:
        """The block's bytes in a page-locked buffer of the calling thread, until its next call."""
        buffer = _staging(self.nbytes)
        self.read_into(buffer)
        return buffer


_local = threading.local()


def _staging(size: int) -> npt.NDArray[np.uint8]:
    """Page-locked host memory of this thread: copies from and to it run at the speed of the bus."""
    buffer: npt.NDArray[np.uint8] | None = getattr(_local, "buffer", None)
    if buffer is None or buffer.nbytes < size:
        runtime = _runtime()
        pointer = int(_checked(runtime.cudaHostAlloc(size, 0)))
        buffer = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))
        _local.buffer = buffer
    return buffer[:size]


class _Blocks:
    """The blocks of an arena by number."""

    def __init__(self, arena: DeviceArena) -> None:
        self._arena = weakref.ref(arena)

    def __getitem__(self, index: int) -> DeviceBlock:
        arena = self._arena()
        assert arena is not None, "the arena lives as long as its blocks are asked for"
        return DeviceBlock(arena, arena.pointer + int(index) * arena.block_bytes, arena.block_bytes)

    def __iter__(self) -> Iterator[DeviceBlock]:
        arena = self._arena()
        return iter(()) if arena is None else (self[index] for index in range(arena.num_blocks))


class DeviceArena:
    """One allocation of device memory.

    Attributes:
        path: None: there is no file.
        handle: Names the allocation to other processes of this machine.
        pointer: Where it begins, in this process.
        blocks: By number.
    """

    path: Path | None = None

    def __init__(self, pointer: int, num_blocks: int, block_bytes: int, handle: bytes) -> None:
        self.pointer = pointer
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.handle = handle
        self.blocks = _Blocks(self)

    @classmethod
    def export(cls, pointer: int, num_blocks: int, block_bytes: int) -> DeviceArena:
        """The worker's side: memory that it allocated and keeps, from the beginning of the allocation.

        Raises:
            ConfigurationError: The device or its driver shares no memory between processes.
        """
        runtime = _runtime()
        handle = bytes(_checked(runtime.cudaIpcGetMemHandle(pointer)).reserved)
        return cls(pointer, num_blocks, block_bytes, handle)

    @classmethod
    def open(cls, handle: bytes, num_blocks: int, block_bytes: int) -> DeviceArena:
        """kv_transfer's side; unmapped when neither the arena nor a block of it is used any more.

        Raises:
            ConfigurationError: The handle is not valid here.
        """
        if len(handle) != HANDLE_BYTES:
            raise ConfigurationError(f"a device handle has {HANDLE_BYTES} bytes, this one {len(handle)}")
        runtime = _runtime()
        wanted = runtime.cudaIpcMemHandle_t()
        wanted.reserved = handle
        pointer = int(_checked(runtime.cudaIpcOpenMemHandle(wanted, runtime.cudaIpcMemLazyEnablePeerAccess)))
        arena = cls(pointer, num_blocks, block_bytes, handle)
        weakref.finalize(arena, runtime.cudaIpcCloseMemHandle, pointer)
        return arena

    def unlink(self) -> None:
        """Nothing to remove: the memory goes with the worker."""
