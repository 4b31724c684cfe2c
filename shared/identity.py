"""Names of things: typed ids, incarnations, and the content hash of a KV block.

A block of `block_size` tokens is named by a chain:

    hash(-1) = H(namespace)                       namespace = fingerprint, cache salt
    hash(i)  = H(hash(i - 1), token_ids[i * block_size : (i + 1) * block_size])

H is BLAKE2b with a 16-byte digest over little-endian int32 tokens: canonical, so that gateway and workers agree without
sharing state. Equal hash therefore means equal model, layout, salt and whole prefix. Imports no torch.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NewType, cast

BlockHash = NewType("BlockHash", bytes)
BlockId = NewType("BlockId", int)
SequenceId = NewType("SequenceId", int)
SessionId = NewType("SessionId", str)
WorkerId = NewType("WorkerId", str)
Incarnation = NewType("Incarnation", str)
Fingerprint = NewType("Fingerprint", str)

HASH_BYTES = 16
_PACKED_BLOCKS = 64  # whose tokens are turned into bytes at a time


def new_incarnation() -> Incarnation:
    """Names one life of one process; a restart is a new one."""
    return Incarnation(secrets.token_hex(8))


def namespace_hash(fingerprint: Fingerprint, cache_salt: str = "") -> BlockHash:
    """The root of a hash chain: blocks under different namespaces never share a name.

    Args:
        fingerprint: Of the model as served: equal only where KV bytes are interchangeable.
        cache_salt: Tenant's secret or any other reason to keep caches apart; "" shares.
    """
    digest = hashlib.blake2b(digest_size=HASH_BYTES, person=b"tandem-ns")
    for part in (fingerprint, cache_salt):
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return BlockHash(digest.digest())


def iter_hashes(parent: BlockHash, token_ids: Sequence[int], block_size: int) -> Iterator[BlockHash]:
    """Hashes of the full blocks of `token_ids`, which follow the block named `parent`, each computed when it is taken.

    Args:
        parent: Hash of the preceding block, or `namespace_hash(...)` at the start of a sequence.
        token_ids: Tokens from a block border on; a partial last block is ignored.
        block_size: Tokens per block.
    """
    digest: bytes = parent
    blake2b, stride = hashlib.blake2b, 4 * block_size
    for first in range(0, len(token_ids), _PACKED_BLOCKS * block_size):
        tokens = token_ids[first : first + _PACKED_BLOCKS * block_size]
        raw = struct.pack(f"<{len(tokens)}i", *tokens)
        for start in range(0, len(raw) - stride + 1, stride):
            digest = blake2b(digest + raw[start : start + stride], digest_size=HASH_BYTES).digest()
            yield cast("BlockHash", digest)


def extend_hashes(parent: BlockHash, token_ids: Sequence[int], block_size: int) -> list[BlockHash]:
    """All that `iter_hashes` gives."""
    return list(iter_hashes(parent, token_ids, block_size))


def prompt_hashes(
    fingerprint: Fingerprint, cache_salt: str, token_ids: Sequence[int], block_size: int
) -> list[BlockHash]:
    """Hashes of every full block of a prompt, first block first."""
    return extend_hashes(namespace_hash(fingerprint, cache_salt), token_ids, block_size)


def join_hashes(hashes: Iterable[BlockHash]) -> bytes:
    """Wire form of a list of hashes."""
    return b"".join(hashes)


def split_hashes(raw: bytes) -> list[BlockHash]:
    """Inverse of `join_hashes`.

    Raises:
        ValueError: `raw` is not a whole number of hashes.
    """
    if len(raw) % HASH_BYTES:
        raise ValueError(f"block hashes: {len(raw)} bytes is not a multiple of {HASH_BYTES}")
    return [BlockHash(raw[i : i + HASH_BYTES]) for i in range(0, len(raw), HASH_BYTES)]
