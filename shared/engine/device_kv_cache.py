"""The KV blocks of a worker whose model runs on a device: the same layout as the arena of a CPU worker, in its memory.

One allocation holds everything, so that another process can be given all of it by one handle.
"""

from __future__ import annotations

import torch

from shared.engine.kv_cache import KV_DTYPES
from shared.kv_arena import KvLayout


class DeviceKvCache:
    """KV blocks in device memory; owns it.

    Attributes:
        layout: Geometry of a block.
        num_blocks: Blocks in all.
        tensor: `[num_blocks, num_layers, 2, block_size, num_kv_heads, row_elements]`, contiguous, zero at first.
        layers: Views of one layer each, `[num_blocks, 2, block_size, num_kv_heads, row_elements]`.
    """

    def __init__(self, num_blocks: int, layout: KvLayout, device: torch.device) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        # Zero, because attention multiplies what it does not use by zero, which is harmless for finite numbers only.
        self.tensor = torch.zeros((num_blocks, *layout.block_shape), dtype=KV_DTYPES[layout.dtype], device=device)
        self.layers = [self.tensor[:, index] for index in range(layout.num_layers)]
