"""What two kv_transfer processes say to each other over the data plane. Pure: bytes in, values out.

    receiver                                      sender
       | posts a receive for every block, tags base + i |
       | -- header: transfer id, token, tag base -----> |  (stream)
       |                                                |  claims the grant
       | <===== block i, tag base + i ================= |
       | <------- trailer: hash, checksum per block --- |  (stream)

Which blocks are sent, and in what order, was agreed on over gRPC: the header carries no block names, so it can ask for
nothing that was not granted. A refusal has no words: the sender closes the endpoint. All integers are little-endian.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from shared.identity import HASH_BYTES, BlockHash

MAGIC = b"TDMT"
VERSION = 1

MAX_BLOCKS = 8192
"""Of one transfer."""

TRANSFER_ID_BYTES = 16
TOKEN_BYTES = 32

_TAG_BITS = 16  # below the random part: room for MAX_BLOCKS
_HEADER = struct.Struct(
    f"<4sHHI{TRANSFER_ID_BYTES}s{TOKEN_BYTES}sQQ"
)  # magic version reserved blocks id token block_bytes tag
_TRAILER = struct.Struct(f"<4sHHI{TRANSFER_ID_BYTES}s")  # magic version reserved blocks id
_ENTRY = struct.Struct(f"<{HASH_BYTES}sQ")  # hash checksum
_SEAL = struct.Struct("<Q")  # xxh3-64 of everything before it

HEADER_BYTES = _HEADER.size + _SEAL.size


class ProtocolError(Exception):
    """The peer said something that this version does not say."""


@dataclass(frozen=True, slots=True)
class Header:
    """Asks for the blocks of one grant.

    Attributes:
        num_blocks: As granted; in `[1, MAX_BLOCKS]`.
        transfer_id: Names the grant.
        token: Proves that the sender of this header was given the grant.
        block_bytes: Of every block.
        tag_base: Block `i` travels under `tag_base + i`; random, because tags are matched across all endpoints.
    """

    num_blocks: int
    transfer_id: bytes
    token: bytes
    block_bytes: int
    tag_base: int

    def encode(self) -> bytes:
        """Exactly `HEADER_BYTES` bytes."""
        return _sealed(
            _HEADER.pack(
                MAGIC, VERSION, 0, self.num_blocks, self.transfer_id, self.token, self.block_bytes, self.tag_base
            )
        )

    @classmethod
    def decode(cls, raw: bytes) -> Header:
        """Inverse of `encode`.

        Raises:
            ProtocolError: Not a header of this version, damaged, or a field out of its range.
        """
        body = _unsealed(raw, _HEADER.size)
        magic, version, reserved, num_blocks, transfer_id, token, block_bytes, tag_base = _HEADER.unpack(body)
        _expect_version(magic, version, reserved)
        if not 1 <= num_blocks <= MAX_BLOCKS:
            raise ProtocolError(f"{num_blocks} blocks; allowed are 1 to {MAX_BLOCKS}")
        if tag_base % (1 << _TAG_BITS):
            raise ProtocolError("tag base is not aligned")
        return cls(num_blocks, transfer_id, token, block_bytes, tag_base)


@dataclass(frozen=True, slots=True)
class Trailer:
    """Says, in order, which blocks were sent: hash and checksum of each."""

    transfer_id: bytes
    blocks: Sequence[tuple[BlockHash, int]]

    def encode(self) -> bytes:
        """Exactly `trailer_bytes(len(self.blocks))` bytes."""
        head = _TRAILER.pack(MAGIC, VERSION, 0, len(self.blocks), self.transfer_id)
        return _sealed(head + b"".join(_ENTRY.pack(block_hash, checksum) for block_hash, checksum in self.blocks))

    @classmethod
    def decode(cls, raw: bytes, transfer_id: bytes) -> Trailer:
        """Inverse of `encode`, for the transfer that is meant.

        Raises:
            ProtocolError: Not a trailer of this version, damaged, of another length, or of another transfer.
        """
        body = _unsealed(raw, len(raw) - _SEAL.size)
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
    return _TRAILER.size + num_blocks * _ENTRY.size + _SEAL.size


def new_tag_base() -> int:
    """A random 64-bit tag whose low bits count blocks; no peer can guess where another transfer's blocks go."""
    return secrets.randbits(64 - _TAG_BITS) << _TAG_BITS


def _sealed(body: bytes) -> bytes:
    return body + _SEAL.pack(xxhash.xxh3_64_intdigest(body))


def _unsealed(raw: bytes, size: int) -> bytes:
    if len(raw) != size + _SEAL.size or size < _TRAILER.size:
        raise ProtocolError(f"{len(raw)} bytes, expected {size + _SEAL.size}")
    body = raw[:size]
    if _SEAL.unpack_from(raw, size)[0] != xxhash.xxh3_64_intdigest(body):
        raise ProtocolError("damaged message")
    return body


def _expect_version(magic: bytes, version: int, reserved: int) -> None:
    if magic != MAGIC or version != VERSION or reserved != 0:
        raise ProtocolError(f"magic {magic!r}, version {version}; this is {MAGIC!r}, version {VERSION}")
