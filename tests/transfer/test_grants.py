"""A grant is good once, for its requester, for a while, for exactly the blocks that it names."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.identity import BlockHash
from shared.transfer.claims import Claims
from shared.transfer.grants import GRANT_S, GrantBook, GrantRefused, Source
from shared.transfer.protocol import HEADER_BYTES, Header, ProtocolError


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def book(clock):
    return GrantBook(clock=clock)


def sources(count=2, size=64):
    return [Source(BlockHash(bytes([i]) * 16), np.zeros(size, np.uint8)) for i in range(count)]


def issue(book, count=2):
    return book.issue(sources(count), requester="decode-0", fingerprint="model")


def header_for(grant, key=None, **changes):
    return Header.signed(dataclasses.replace(grant.claims, **changes), 1 << 16, key or grant.key)


async def test_a_grant_is_claimed_once(book):
    grant = issue(book)
    assert book.claim(header_for(grant), endpoint="e") is grant
    assert grant.endpoint == "e"
    with pytest.raises(GrantRefused, match="used or revoked"):
        book.claim(header_for(grant), endpoint="e")


async def test_the_requester_computes_the_same_claims_from_what_it_asked_for(book):
    grant = issue(book)
    claims = Claims.of(
        grant.transfer_id,
        requester="decode-0",
        fingerprint="model",
        block_hashes=[source.block_hash for source in grant.sources],
        block_bytes=64,
        expires_ms=grant.claims.expires_ms,
    )
    assert book.claim(Header.signed(claims, 0, grant.key), endpoint="e") is grant


@pytest.mark.parametrize(
    "wrong",
    [
        {"requester": "decode-1"},
        {"fingerprint": "another model"},
        {"block_hashes": [BlockHash(b"\0" * 16)]},
        {"block_hashes": [BlockHash(b"\1" * 16), BlockHash(b"\0" * 16)]},
        {"block_hashes": [BlockHash(b"\0" * 16), BlockHash(b"\2" * 16)]},
        {"block_bytes": 65},
        {"expires_ms": 10**12},
    ],
    ids=str,
)
async def test_other_claims_than_those_granted_are_refused_and_spoil_nothing(book, wrong):
    grant = issue(book)
    right = {
        "requester": "decode-0",
        "fingerprint": "model",
        "block_hashes": [source.block_hash for source in grant.sources],
        "block_bytes": 64,
        "expires_ms": grant.claims.expires_ms,
    }
    claims = Claims.of(grant.transfer_id, **{**right, **wrong})
    with pytest.raises(GrantRefused, match="forged or changed"):
        book.claim(Header.signed(claims, 0, grant.key), endpoint="thief")
    assert book.claim(header_for(grant), endpoint="owner") is grant


async def test_a_wrong_key_is_refused_and_spoils_nothing(book):
    grant, other = issue(book), issue(book)
    for key in (b"x" * 32, other.key):
        with pytest.raises(GrantRefused, match="forged or changed"):
            book.claim(header_for(grant, key), endpoint="thief")
    assert book.claim(header_for(grant), endpoint="owner") is grant


async def test_a_key_of_another_holder_is_refused(book, clock):
    stranger = issue(GrantBook(clock=clock))
    with pytest.raises(GrantRefused, match="not granted here"):
        book.claim(header_for(stranger), endpoint="e")


async def test_where_the_blocks_go_is_signed_too(book):
    grant = issue(book)
    with pytest.raises(GrantRefused, match="forged"):
        book.claim(dataclasses.replace(header_for(grant), tag_base=2 << 16), endpoint="e")


async def test_an_expired_grant_is_refused(book, clock):
    grant = issue(book)
    clock.now += GRANT_S
    with pytest.raises(GrantRefused, match="expired"):
        book.claim(header_for(grant), endpoint="e")
    assert len(book) == 0


async def test_a_revoked_grant_is_worthless(book):
    grant = issue(book)
    book.revoke(grant)
    book.revoke(grant)
    with pytest.raises(GrantRefused, match="used or revoked"):
        book.claim(header_for(grant), endpoint="e")


async def test_grants_have_names_and_keys_of_their_own(book):
    grants = [issue(book) for _ in range(50)]
    assert len({grant.transfer_id for grant in grants}) == len({grant.key for grant in grants}) == 50


@given(
    flips=st.dictionaries(st.integers(0, HEADER_BYTES - 1), st.integers(1, 255), min_size=1, max_size=8),
    tail=st.binary(max_size=8),
)
async def test_no_tampered_header_is_ever_served(flips, tail):
    book = GrantBook(clock=Clock())
    grant = issue(book)
    raw = bytearray(header_for(grant).encode())
    for index, mask in flips.items():
        raw[index] ^= mask
    with pytest.raises((ProtocolError, GrantRefused)):
        book.claim(Header.decode(bytes(raw) + tail), endpoint="thief")
    assert book.claim(header_for(grant), endpoint="owner") is grant


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12))
async def test_mixing_parts_of_several_grants_never_opens_one(parts):
    """Transfer names of one grant, blocks of another, the key of a third."""
    book = GrantBook(clock=Clock())
    grants = [issue(book, count=count) for count in (1, 2, 3, 4)]
    for name, blocks, key in parts:
        claims = dataclasses.replace(grants[blocks].claims, transfer_id=grants[name].transfer_id)
        header = Header.signed(claims, 0, grants[key].key)
        if name == blocks == key and grants[name].endpoint is None:
            assert book.claim(header, endpoint="owner") is grants[name]
        else:
            with pytest.raises(GrantRefused):
                book.claim(header, endpoint="thief")
