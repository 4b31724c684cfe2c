"""The KV arena as the model sees it: one tensor, one view per layer."""

from __future__ import annotations

import torch

from shared.errors import ConfigurationError
from shared.kv_arena import KvLayout, SharedArena

KV_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
}


class KvCache:
    """A worker's KV blocks as a tensor over the shared arena; owns nothing, and keeps the mapping alive.

    Attributes:
        layout: Geometry of a block.
        num_blocks: Blocks in all.
        tensor: `[num_blocks, num_layers, 2, block_size, num_kv_heads, row_elements]`, CPU, contiguous.
        layers: `layer(i)` for all layers, made once.
    """

    def __init__(self, arena: SharedArena, layout: KvLayout) -> None:
        """Wraps the arena without copying.

        Raises:
            ConfigurationError: The arena's blocks have another size than the layout's.
        """
        if arena.block_bytes != layout.block_bytes:
            raise ConfigurationError(
                f"KV arena {arena.path} has blocks of {arena.block_bytes} bytes, the model needs {layout.block_bytes}"
            )
        self.layout = layout
        self.num_blocks = arena.num_blocks
        self.tensor = torch.from_numpy(arena.blocks).view(KV_DTYPES[layout.dtype]).view(-1, *layout.block_shape)
        self.layers = [self.tensor[:, index] for index in range(layout.num_layers)]

    def layer(self, index: int) -> torch.Tensor:
        """One layer's view `[num_blocks, 2, block_size, num_kv_heads, row_elements]`, strided by whole blocks."""
        return self.layers[index]


def num_blocks_for(size_bytes: int, layout: KvLayout) -> int:
    """Blocks that fit into a budget.

    Raises:
        ConfigurationError: Not even one fits, said with both numbers.
    """
    count = size_bytes // layout.block_bytes
    if count < 1:
        raise ConfigurationError(f"KV cache of {size_bytes} bytes is smaller than one block of {layout.block_bytes}")
    return count
