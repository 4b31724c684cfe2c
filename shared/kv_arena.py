"""The KV arena: all of a worker's KV blocks in one shared-memory file, mapped by the worker and by its kv_transfer.

Block-major, so that one block is one contiguous run of bytes, sent and received as one message with no staging:

    [num_blocks, num_layers, 2 (key, value), block_size, num_kv_heads, head_dim]
     `------------------ one block: `block_bytes` -----------------------------'

Blocks of int8 hold, behind the head_dim values of every head, their float32 scale: a row is head_dim + 4 bytes then.
Blocks of fp8 hold values alone: a row is head_dim bytes.
A layer's view `arena[:, layer]` is strided by whole blocks; kernels take that stride. Imports no torch: the engine
wraps `SharedArena.blocks` in a tensor, kv_transfer in UCX arrays.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from kernels.huge_pages import map_aligned
from shared.errors import ConfigurationError

LAYOUT_VERSION = 1

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1, "float8_e4m3fnuz": 1}

SCALE_BYTES = 4
"""Behind every row of an int8 cache; see `kernels.reference.quantized_kv`."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Geometry of one block.

    Attributes:
        block_size: Tokens per block.
        dtype: Name of the element type, a key of `DTYPE_BYTES`.
    """

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """`(num_layers, 2, block_size, num_kv_heads, row_elements)`."""
        return (self.num_layers, 2, self.block_size, self.num_kv_heads, self.row_elements)

    @property
    def row_elements(self) -> int:
        """Elements of one token's row of one head: its values and, of int8, their scale."""
        return self.head_dim + (SCALE_BYTES if self.dtype == "int8" else 0)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        elements = self.num_layers * 2 * self.block_size * self.num_kv_heads * self.row_elements
        return elements * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of KV per token over all layers."""
        return self.block_bytes // self.block_size


class SharedArena:
    """A mapping of the arena file. Creator and openers each own their mapping; the creator owns the file.

    Attributes:
        path: The file, normally under /dev/shm.
        blocks: uint8 `[num_blocks, block_bytes]`; writable, shared, mapped as long as it or a view of it lives.
    """

    def __init__(self, path: Path, num_blocks: int, block_bytes: int, *, create: bool) -> None:
        self.path = path
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        size = num_blocks * block_bytes
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if create else 0)
        descriptor = os.open(path, flags, 0o600)
        try:
            if create:
                os.ftruncate(descriptor, size)
            elif os.fstat(descriptor).st_size != size:
                raise ConfigurationError(
                    f"KV arena {path}: {os.fstat(descriptor).st_size} bytes, expected {num_blocks} x {block_bytes}"
                )
            self.blocks = map_aligned(descriptor, size, writable=True).reshape(num_blocks, block_bytes)
        finally:
            os.close(descriptor)

    @classmethod
    def create(cls, path: Path, num_blocks: int, block_bytes: int) -> SharedArena:
        """Makes the file, replacing one that an earlier incarnation left; its bytes are zero.

        Raises:
            ConfigurationError: The file system has no room, said with both numbers (a tmpfs that overflows later would
                kill the process with SIGBUS).
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        needed, free = num_blocks * block_bytes, shutil.disk_usage(path.parent).free
        if needed > free:
            raise ConfigurationError(
                f"KV arena of {needed >> 20} MiB does not fit into {path.parent}: {free >> 20} MiB free"
            )
        return cls(path, num_blocks, block_bytes, create=True)

    @classmethod
    def open(cls, path: Path, num_blocks: int, block_bytes: int) -> SharedArena:
        """Maps an arena that the worker made.

        Raises:
            ConfigurationError: Its size is not `num_blocks * block_bytes`.
            FileNotFoundError: It is gone.
        """
        return cls(path, num_blocks, block_bytes, create=False)

    def unlink(self) -> None:
        """Removes the name; mappings live on until their processes drop them."""
        self.path.unlink(missing_ok=True)
