"""What a grant covers, bound together by an HMAC: who may fetch which blocks, of which kind, until when.

    holder:   key   = HMAC(holder's secret, claims)        handed to the requester over gRPC, never sent over UCX
    receiver: proof = HMAC(key, claims and where to send)  the header of the transfer, over UCX
    holder:   derives the key again from the claims it is shown, and checks the proof in constant time

Nothing that was heard on the wire is of use to anybody else: a proof names one transfer, which can be claimed once, and
changing any of the claims, or where the blocks go, takes the key. The trailer is signed with the key, too.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from shared.identity import BlockHash

TRANSFER_ID_BYTES = 16
KEY_BYTES = 32
PROOF_BYTES = 32

_DIGEST_BYTES = 16
# transfer, requester, fingerprint, blocks, count, bytes of each, expiry
_CLAIMS = struct.Struct(f"<{TRANSFER_ID_BYTES}s{_DIGEST_BYTES}s{_DIGEST_BYTES}s{_DIGEST_BYTES}sIQQ")

CLAIMS_BYTES = _CLAIMS.size


@dataclass(frozen=True, slots=True)
class Claims:
    """One transfer, as both sides know it; each side computes the digests by itself.

    Attributes:
        requester: Digest of the id of the worker that the blocks are for.
        fingerprint: Digest of what the blocks' KV is good for.
        blocks: Digest of the block hashes, in the order of the transfer.
        expires_ms: On the holder's own clock; opaque to the receiver.
    """

    transfer_id: bytes
    requester: bytes
    fingerprint: bytes
    blocks: bytes
    num_blocks: int
    block_bytes: int
    expires_ms: int

    @classmethod
    def of(
        cls,
        transfer_id: bytes,
        *,
        requester: str,
        fingerprint: str,
        block_hashes: Sequence[BlockHash],
        block_bytes: int,
        expires_ms: int,
    ) -> Self:
        """The claims for these blocks."""
        return cls(
            transfer_id=transfer_id,
            requester=_digest(requester.encode()),
            fingerprint=_digest(fingerprint.encode()),
            blocks=_digest(b"".join(block_hashes)),
            num_blocks=len(block_hashes),
            block_bytes=block_bytes,
            expires_ms=expires_ms,
        )

    def encode(self) -> bytes:
        """Exactly `CLAIMS_BYTES` bytes."""
        return _CLAIMS.pack(
            self.transfer_id,
            self.requester,
            self.fingerprint,
            self.blocks,
            self.num_blocks,
            self.block_bytes,
            self.expires_ms,
        )

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Inverse of `encode`; takes any bytes of that length."""
        return cls(*_CLAIMS.unpack(raw))

    def key(self, secret: bytes) -> bytes:
        """What entitles to this transfer; only whoever has `secret` can make it."""
        return hmac.digest(secret, self.encode(), "sha256")


def prove(key: bytes, message: bytes) -> bytes:
    """Shows knowledge of `key` without showing it, for this message alone."""
    return hmac.digest(key, message, "sha256")


def is_proof(key: bytes, message: bytes, proof: bytes) -> bool:
    """Whether `proof` was made of this message with this key; takes equally long either way."""
    return hmac.compare_digest(prove(key, message), proof)


def _digest(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=_DIGEST_BYTES).digest()
