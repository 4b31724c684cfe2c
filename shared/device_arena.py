"""A worker's KV blocks in device memory, shared with its kv_transfer by a CUDA IPC handle.

The worker owns the memory; kv_transfer maps it under an address of its own. A block is then what array libraries take
for device memory, and UCX sends from it and receives into it.

What outlives a worker. The driver frees a process's memory with the process, so the next life starts with an empty
cache: a drained worker has copied everything to kv_transfer's host tier before, a killed one what it had time for (see
`shared.worker.save_ahead`), and the host tier serves that on, to peers and to the next life. The other way round,
kv_transfer owning the memory, was decided against: UCX may abort its process, and would take the worker's cache, and
with it the worker, along; as it is a crash of the transport costs no KV.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from protos import kv_transfer_pb2 as pb
from shared.cuda import checked, cuda_driver, cuda_runtime, page_locked
from shared.device_checksum import DeviceChecksums
from shared.errors import ConfigurationError

HANDLE_BYTES = 64


def open_device(device: int = 0) -> None:
    """Makes the device usable in this process; before UCX is opened, which looks for devices then.

    Raises:
        ConfigurationError: There is no such device.
    """
    runtime = cuda_runtime()
    checked(runtime.cudaSetDevice(device))
    checked(runtime.cudaFree(0))


class DeviceBlock:
    """One block of a `DeviceArena`, as array libraries and UCX see device memory; keeps the mapping alive."""

    __slots__ = ("__cuda_array_interface__", "arena", "index", "nbytes", "pointer")

    def __init__(self, arena: DeviceArena, index: int) -> None:
        self.arena = arena
        self.index = index
        self.nbytes = nbytes = arena.block_bytes
        self.pointer = pointer = arena.pointer + index * nbytes
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
            "strides": None,
        }

    def read_into(self, target: npt.NDArray[np.uint8]) -> None:
        """Copies the block to the host; blocks until it is there."""
        runtime = cuda_runtime()
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        checked(runtime.cudaMemcpy(target.ctypes.data, self.pointer, self.nbytes, kind))

    def write_from(self, source: npt.NDArray[np.uint8]) -> None:
        """Copies the block from the host; blocks until it is on the device."""
        runtime = cuda_runtime()
        kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        checked(runtime.cudaMemcpy(self.pointer, source.ctypes.data, self.nbytes, kind))
        checked(runtime.cudaStreamSynchronize(0))

    def staging(self) -> npt.NDArray[np.uint8]:
        """A page-locked buffer of the block's size; the calling thread's until its next call."""
        return _staging(self.nbytes)


_local = threading.local()


def _staging(size: int) -> npt.NDArray[np.uint8]:
    """Page-locked memory of this thread."""
    buffer: npt.NDArray[np.uint8] | None = getattr(_local, "buffer", None)
    if buffer is None or buffer.nbytes < size:
        _local.buffer = buffer = page_locked(size)
    return buffer[:size]


class _Blocks:
    """The blocks of an arena by number."""

    def __init__(self, arena: DeviceArena) -> None:
        self._arena = weakref.ref(arena)

    def __getitem__(self, index: int) -> DeviceBlock:
        arena = self._arena()
        assert arena is not None, "the arena lives as long as its blocks are asked for"
        return DeviceBlock(arena, int(index))

    def __iter__(self) -> Iterator[DeviceBlock]:
        arena = self._arena()
        assert arena is not None, "the arena lives as long as its blocks are asked for"
        return (DeviceBlock(arena, index) for index in range(arena.num_blocks))


class DeviceArena:
    """One allocation of device memory.

    Attributes:
        path: None: there is no file.
        handle: Names the allocation to other processes of this machine.
        offset: Of the arena in the allocation, in bytes: an allocator cuts small ones out of larger ones.
        checksum_kernels: For its blocks.
        pointer: Where it begins, in this process.
        blocks: By number.
    """

    path: Path | None = None

    def __init__(
        self,
        pointer: int,
        num_blocks: int,
        block_bytes: int,
        handle: bytes,
        offset: int,
        checksum_kernels: pb.ChecksumKernels,
    ) -> None:
        self.pointer = pointer
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.handle = handle
        self.offset = offset
        self.checksum_kernels = checksum_kernels
        self.blocks = _Blocks(self)

    @functools.cached_property
    def _checksums(self) -> DeviceChecksums:
        return DeviceChecksums(self.checksum_kernels, self.pointer, self.block_bytes)

    def checksums(self, blocks: Sequence[DeviceBlock]) -> list[int]:
        """The xxh3-64 of each of its blocks; waits for the device."""
        return self._checksums.of([block.index for block in blocks])

    @classmethod
    def export(
        cls, pointer: int, num_blocks: int, block_bytes: int, checksum_kernels: pb.ChecksumKernels
    ) -> DeviceArena:
        """The worker's side: memory that it allocated and keeps.

        Raises:
            ConfigurationError: The device or its driver shares no memory between processes.
        """
        runtime = cuda_runtime()
        handle = bytes(checked(runtime.cudaIpcGetMemHandle(pointer)).reserved)
        offset = pointer - int(checked(cuda_driver().cuMemGetAddressRange(pointer))[0])
        return cls(pointer, num_blocks, block_bytes, handle, offset, checksum_kernels)

    @classmethod
    def open(
        cls, handle: bytes, offset: int, num_blocks: int, block_bytes: int, checksum_kernels: pb.ChecksumKernels
    ) -> DeviceArena:
        """kv_transfer's side; unmapped when neither the arena nor a block of it is used any more.

        Raises:
            ConfigurationError: The handle, or a kernel, is not valid here.
        """
        if len(handle) != HANDLE_BYTES:
            raise ConfigurationError(f"a device handle has {HANDLE_BYTES} bytes, this one {len(handle)}")
        runtime = cuda_runtime()
        wanted = runtime.cudaIpcMemHandle_t()
        wanted.reserved = handle
        base = int(checked(runtime.cudaIpcOpenMemHandle(wanted, runtime.cudaIpcMemLazyEnablePeerAccess)))
        arena = cls(base + offset, num_blocks, block_bytes, handle, offset, checksum_kernels)
        weakref.finalize(arena, runtime.cudaIpcCloseMemHandle, base)
        _ = arena._checksums  # now, so that a kernel that cannot be loaded is refused
        return arena

    def unlink(self) -> None:
        """Nothing to remove: the memory goes with the worker."""
