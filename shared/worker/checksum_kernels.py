"""The checksum's kernels as kv_transfer gets them: see `shared.device_checksum`, which launches them."""

from __future__ import annotations

import struct
from typing import Any

from kernels.triton.block_checksum import checksum_keys, compile_checksum
from protos import kv_transfer_pb2 as pb
from shared.errors import ConfigurationError

_THREADS_PER_WARP = 32


def checksum_kernels(block_bytes: int) -> pb.ChecksumKernels:
    """Compiles them for the current device and blocks of `block_bytes`.

    Raises:
        ConfigurationError: Blocks of such a size have no checksum.
    """
    try:
        compiled = compile_checksum(block_bytes)
    except ValueError as exc:
        raise ConfigurationError(str(exc)) from exc
    keys = checksum_keys()
    return pb.ChecksumKernels(
        sums=_kernel(compiled.sums),
        fold=_kernel(compiled.fold),
        keys=struct.pack(f"<{len(keys)}q", *keys),
        programs_per_block=compiled.programs_per_block,
        scratch_bytes_per_block=compiled.sums_bytes_per_block,
    )


def _kernel(compiled: Any) -> pb.DeviceKernel:
    """What Triton knows of a kernel. Beyond those of its source it has parameters of Triton's own, unused here."""
    return pb.DeviceKernel(
        binary=compiled.asm["cubin"],
        name=compiled.metadata.name,
        threads=compiled.metadata.num_warps * _THREADS_PER_WARP,
        shared_bytes=compiled.metadata.shared,
        num_parameters=compiled.asm["ptx"].count(".param .u64"),
    )
