"""What the gateway asks a worker to embed."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from shared.models.embedding import PoolingName


@dataclass(frozen=True, slots=True)
class EmbedCall:
    """Some inputs of one request.

    Attributes:
        dimensions: How much of each vector; 0 = all.
        normalize: To length 1, after the cut.
        priority: Lower is sooner.
    """

    inputs: list[list[int]]
    pooling: PoolingName
    normalize: bool
    dimensions: int = 0
    cache_salt: str = ""
    priority: int = 0
    call_id: str = field(default_factory=lambda: f"embed-{secrets.token_hex(12)}")
