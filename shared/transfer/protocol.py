"""What two kv_transfer processes say to each other over the data plane. Pure: bytes in, values out.

    receiver                                      sender
       | posts a receive for every block, tags base + i |
       | -- header: claims, tag base, proof ----------> |  (stream)
       |                                                |  claims the grant
       | <===== block i, tag base + i ================= |
       | <------- trailer: hash, checksum per block --- |  (stream)

Which blocks are sent, and in what order, was agreed on over gRPC: the header carries no block names, so it can ask for
nothing that was not granted. Header and trailer are signed with the grant's key (see `claims`). A refusal has no words:
the sender closes the endpoint. All integers are little-endian.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from shared.identity import HASH_BYTES, BlockHash
from shared.transfer.claims import CLAIMS_BYTES, PROOF_BYTES, TRANSFER_ID_BYTES, Claims, is_proof, prove

MAGIC = b"TDMT"
VERSION = 2

WITHDRAWN = BlockHash(bytes(HASH_BYTES))
"""In a trailer: the block went away while it was sent, what arrived is worthless."""

MAX_BLOCKS = 8192
"""Of one transfer."""

_TAG_BITS = 16  # below the random part: room for MAX_BLOCKS
_HEADER = struct.Struct(f"<4sHH{CLAIMS_BYTES}sQ")  # magic version reserved claims tag
_TRAILER = struct.Struct(f"<4sHHI{TRANSFER_ID_BYTES}s")  # magic version reserved blocks id
_ENTRY = struct.Struct(f"<{HASH_BYTES}sQ")  # hash checksum

HEADER_BYTES = _HEADER.size + PROOF_BYTES


class ProtocolError(Exception):
    """The peer said something that this version does not say."""


@dataclass(frozen=True, slots=True)
class Header:
    """Asks for the blocks of one grant.

    Attributes:
        claims: Of the grant.
        tag_base: Block `i` travels under `tag_base + i`; random, because tags are matched across all endpoints.
        proof: Of `claims` and `tag_base`, with the grant's key.
    """

    claims: Claims
    tag_base: int
    proof: bytes

    @classmethod
    def signed(cls, claims: Claims, tag_base: int, key: bytes) -> Header:
        """A header that whoever derives `key` believes."""
        return cls(claims, tag_base, prove(key, _header_body(claims, tag_base)))

    def is_signed_with(self, key: bytes) -> bool:
        """Whether its maker knew `key`; takes equally long either way."""
        return is_proof(key, _header_body(self.claims, self.tag_base), self.proof)

    def encode(self) -> bytes:
        """Exactly `HEADER_BYTES` bytes."""
        return _header_body(self.claims, self.tag_base) + self.proof

    @classmethod
    def decode(cls, raw: bytes) -> Header:
        """Inverse of `encode`; whether it is genuine is not known yet.

        Raises:
            ProtocolError: Not a header of this version, or a field out of its range.
        """
        if len(raw) != HEADER_BYTES:
            raise ProtocolError(f"{len(raw)} bytes, expected {HEADER_BYTES}")
        magic, version, reserved, claimed, tag_base = _HEADER.unpack_from(raw)
        _expect_version(magic, version, reserved)
        claims = Claims.decode(claimed)
        if not 1 <= claims.num_blocks <= MAX_BLOCKS:
            raise ProtocolError(f"{claims.num_blocks} blocks; allowed are 1 to {MAX_BLOCKS}")
        if tag_base % (1 << _TAG_BITS):
            raise ProtocolError("tag base is not aligned")
        return cls(claims, tag_base, raw[_HEADER.size :])


@dataclass(frozen=True, slots=True)
class Trailer:
    """Says, in order, which blocks were sent: hash and checksum of each."""

    transfer_id: bytes
    blocks: Sequence[tuple[BlockHash, int]]

    def encode(self, key: bytes) -> bytes:
        """Exactly `trailer_bytes(len(self.blocks))` bytes, signed."""
        head = _TRAILER.pack(MAGIC, VERSION, 0, len(self.blocks), self.transfer_id)
        body = head + b"".join(_ENTRY.pack(block_hash, checksum) for block_hash, checksum in self.blocks)
        return body + prove(key, body)

    @classmethod
    def decode(cls, raw: bytes, transfer_id: bytes, key: bytes) -> Trailer:
        """Inverse of `encode`, for the transfer that is meant.

        Raises:
            ProtocolError: Not a trailer of this version, forged or damaged, of another length or transfer.
        """
        body, proof = raw[:-PROOF_BYTES], raw[-PROOF_BYTES:]
        if len(body) < _TRAILER.size:
            raise ProtocolError(f"trailer of {len(raw)} bytes")
        if not is_proof(key, body, proof):
            raise ProtocolError("forged or damaged message")
        magic, version, reserved, num_blocks, answered = _TRAILER.unpack_from(body)
        _expect_version(magic, version, reserved)
        if answered != transfer_id:
            raise ProtocolError("trailer of another transfer")
        if len(raw) != trailer_bytes(num_blocks):
            raise ProtocolError(f"trailer of {len(raw)} bytes names {num_blocks} blocks")
        entries = [(BlockHash(name), int(checksum)) for name, checksum in _ENTRY.iter_unpack(body[_TRAILER.size :])]
        return cls(transfer_id, entries)


def trailer_bytes(num_blocks: int) -> int:
    """Length of a trailer that names `num_blocks` blocks."""
    return _TRAILER.size + num_blocks * _ENTRY.size + PROOF_BYTES


def new_tag_base() -> int:
    """A random 64-bit tag whose low bits count blocks; no peer can guess where another transfer's blocks go."""
    return secrets.randbits(64 - _TAG_BITS) << _TAG_BITS


def _header_body(claims: Claims, tag_base: int) -> bytes:
    return _HEADER.pack(MAGIC, VERSION, 0, claims.encode(), tag_base)


def _expect_version(magic: bytes, version: int, reserved: int) -> None:
    if magic != MAGIC or version != VERSION or reserved != 0:
        raise ProtocolError(f"magic {magic!r}, version {version}; this is {MAGIC!r}, version {VERSION}")
