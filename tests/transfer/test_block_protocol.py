"""Framing: what is well-formed survives, everything else is refused before anything is allocated."""

import dataclasses
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.identity import BlockHash
from shared.transfer.claims import Claims
from shared.transfer.protocol import (
    HEADER_BYTES,
    MAX_BLOCKS,
    Header,
    ProtocolError,
    Trailer,
    new_tag_base,
    trailer_bytes,
)

KEY = b"k" * 32
CLAIMS = Claims(b"i" * 16, b"r" * 16, b"f" * 16, b"b" * 16, num_blocks=3, block_bytes=4096, expires_ms=12345)
HEADER = Header.signed(CLAIMS, 7 << 16, KEY)


def test_header_survives_the_wire():
    raw = HEADER.encode()
    assert len(raw) == HEADER_BYTES
    assert Header.decode(raw) == HEADER
    assert Header.decode(raw).is_signed_with(KEY)
    assert not Header.decode(raw).is_signed_with(b"K" * 32)
    assert KEY not in raw


@pytest.mark.parametrize("num_blocks", [0, 1, MAX_BLOCKS, 1000])
def test_trailer_survives_the_wire(num_blocks):
    trailer = Trailer(b"i" * 16, [(BlockHash(os.urandom(16)), i * 2**50) for i in range(num_blocks)])
    raw = trailer.encode(KEY)
    assert len(raw) == trailer_bytes(num_blocks)
    assert Trailer.decode(raw, b"i" * 16, KEY) == trailer
    with pytest.raises(ProtocolError, match="forged"):
        Trailer.decode(raw, b"i" * 16, b"K" * 32)


@pytest.mark.parametrize(
    ("change", "tag_base", "complaint"),
    [
        ({"num_blocks": 0}, 0, "0 blocks"),
        ({"num_blocks": MAX_BLOCKS + 1}, 0, "blocks; allowed"),
        ({"num_blocks": 2**32 - 1}, 0, "blocks; allowed"),
        ({}, 5, "not aligned"),
    ],
)
def test_hostile_header_fields_are_refused(change, tag_base, complaint):
    raw = Header.signed(dataclasses.replace(CLAIMS, **change), tag_base, KEY).encode()
    with pytest.raises(ProtocolError, match=complaint):
        Header.decode(raw)


@given(st.binary(max_size=300))
def test_random_bytes_are_never_a_message(raw):
    with pytest.raises(ProtocolError):
        Header.decode(raw)
    with pytest.raises(ProtocolError):
        Trailer.decode(raw, b"i" * 16, KEY)


@given(st.integers(0, HEADER_BYTES * 8 - 1))
def test_a_flipped_bit_is_noticed(bit):
    raw = bytearray(HEADER.encode())
    raw[bit // 8] ^= 1 << bit % 8
    try:
        header = Header.decode(bytes(raw))
    except ProtocolError:
        return
    assert not header.is_signed_with(KEY)


def test_a_trailer_of_another_transfer_is_refused():
    raw = Trailer(b"a" * 16, [(BlockHash(bytes(16)), 1)]).encode(KEY)
    with pytest.raises(ProtocolError, match="another transfer"):
        Trailer.decode(raw, b"b" * 16, KEY)


def test_tag_bases_are_random_and_leave_room_for_every_block():
    bases = {new_tag_base() for _ in range(100)}
    assert len(bases) == 100
    assert all(base % 2**16 == 0 and base + MAX_BLOCKS < 2**64 for base in bases)
