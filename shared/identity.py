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
TOKEN_BYTES = 4


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


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as they are hashed and sent: int32, little-endian.

    Raises:
        struct.error: One is no int32.
    """
    return struct.pack(f"<{len(token_ids)}i", *token_ids)


def unpack_tokens(packed: bytes) -> list[int]:
    """Inverse of `pack_tokens`.

    Raises:
        ValueError: `packed` is not a whole number of ids.
    """
    if len(packed) % TOKEN_BYTES:
        raise ValueError(f"token ids: {len(packed)} bytes is not a multiple of {TOKEN_BYTES}")
    return list(struct.unpack(f"<{len(packed) // TOKEN_BYTES}i", packed))


def iter_hashes(parent: BlockHash, packed: bytes, block_size: int) -> Iterator[BlockHash]:
    """Hashes of the full blocks of packed tokens, which follow the block `parent`, each computed when it is taken.

    Args:
        parent: Hash of the preceding block, or `namespace_hash(...)` at the start of a sequence.
        packed: Tokens from a block border on, see `pack_tokens`; a partial last block is ignored.
        block_size: Tokens per block.
    """
    digest: bytes = parent
    blake2b, stride = hashlib.blake2b, TOKEN_BYTES * block_size
    for start in range(0, len(packed) - stride + 1, stride):
        digest = blake2b(digest + packed[start : start + stride], digest_size=HASH_BYTES).digest()
        yield cast("BlockHash", digest)


def extend_hashes(parent: BlockHash, token_ids: Sequence[int], block_size: int) -> list[BlockHash]:
    """All that `iter_hashes` gives."""
    return list(iter_hashes(parent, pack_tokens(token_ids), block_size))


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
