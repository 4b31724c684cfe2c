"""The xxh3-64 of blocks in device memory, taken where they lie.

To bring a block to the host for it would take the bus and a core longer than the transfer itself. The worker compiles
the kernels (`kernels/triton/block_checksum.py`) and hands them over with its memory; here they are only launched, so
that kv_transfer needs neither torch nor Triton.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from protos import kv_transfer_pb2 as pb
from shared.cuda import checked, cuda_driver, cuda_runtime

_BYTES_AT_ONCE = 256 << 20


class DeviceChecksums:
    """Takes checksums of one arena's blocks; from any thread, one call after the other.

    Args:
        kernels: For blocks of `block_bytes`.
        arena: Its address in this process.
        block_bytes: Of a block.

    Raises:
        ConfigurationError: The kernels are not for this device, or it has no memory left for them.
    """

    def __init__(self, kernels: pb.ChecksumKernels, arena: int, block_bytes: int) -> None:
        runtime = cuda_runtime()
        checked(runtime.cudaFree(0))  # makes the device's context this thread's, which the driver's calls ask for
        self._arena = arena
        self._programs_per_block = kernels.programs_per_block
        self._at_once = max(1, _BYTES_AT_ONCE // block_bytes)
        self._lock = threading.Lock()
        with contextlib.ExitStack() as stack:
            self._sums, self._fold = (_Kernel(kernel, stack) for kernel in (kernels.sums, kernels.fold))
            self._ids = _allocate(4 * self._at_once, stack)
            self._found = _allocate(8 * self._at_once, stack)
            self._scratch = _allocate(kernels.scratch_bytes_per_block * self._at_once, stack)
            self._keys = _allocate(len(kernels.keys), stack)
            checked(runtime.cudaMemcpy(self._keys, kernels.keys, len(kernels.keys), _kind().cudaMemcpyHostToDevice))
            # One of its own, which waits for nothing else; what brought the blocks has said that they are there.
            self._stream = checked(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
            stack.callback(runtime.cudaStreamDestroy, self._stream)
            weakref.finalize(self, stack.pop_all().close)

    def of(self, block_ids: Sequence[int]) -> list[int]:
        """The checksum of each block. Blocks the calling thread."""
        checksums: list[int] = []
        for start in range(0, len(block_ids), self._at_once):
            with self._lock:
                checksums += self._take(np.array(block_ids[start : start + self._at_once], dtype=np.int32))
        return checksums

    def _take(self, block_ids: npt.NDArray[np.int32]) -> list[int]:
        n = len(block_ids)
        found = np.empty(n, dtype=np.uint64)
        self._copy(self._ids, block_ids.ctypes.data, block_ids.nbytes, _kind().cudaMemcpyHostToDevice)
        pointers = (self._arena, self._ids, self._keys, self._scratch)
        self._sums.launch((n, self._programs_per_block), pointers, self._stream)
        self._fold.launch((n, 1), (self._scratch, self._keys, self._found), self._stream)
        self._copy(found.ctypes.data, self._found, found.nbytes, _kind().cudaMemcpyDeviceToHost)
        checked(cuda_runtime().cudaStreamSynchronize(self._stream))
        return [int(checksum) for checksum in found]

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        checked(cuda_runtime().cudaMemcpyAsync(target, source, size, kind, self._stream))


def _allocate(size: int, stack: contextlib.ExitStack) -> int:
    """Device memory for as long as `stack` is open."""
    runtime = cuda_runtime()
    pointer = int(checked(runtime.cudaMalloc(size)))
    stack.callback(runtime.cudaFree, pointer)
    return pointer


class _Kernel:
    """One kernel, loaded for as long as `stack` is open."""

    def __init__(self, kernel: pb.DeviceKernel, stack: contextlib.ExitStack) -> None:
        driver = cuda_driver()
        module = checked(driver.cuModuleLoadData(kernel.binary))
        stack.callback(driver.cuModuleUnload, module)
        self._function = checked(driver.cuModuleGetFunction(module, kernel.name.encode()))
        self._threads, self._shared_bytes = kernel.threads, kernel.shared_bytes
        self._num_parameters = kernel.num_parameters

    def launch(self, grid: tuple[int, int], pointers: tuple[int, ...], stream: Any) -> None:
        values = (*pointers, *(0 for _ in range(self._num_parameters - len(pointers))))
        parameters = (values, (ctypes.c_void_p,) * len(values))
        checked(
            cuda_driver().cuLaunchKernel(
                self._function, *grid, 1, self._threads, 1, 1, self._shared_bytes, int(stream), parameters, 0
            )
        )


def _kind() -> Any:
    return cuda_runtime().cudaMemcpyKind
