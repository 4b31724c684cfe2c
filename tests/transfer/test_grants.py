"""A grant is good once, for its owner, for a while, for exactly what it says."""

import dataclasses

import numpy as np
import pytest

from shared.identity import BlockHash
from shared.transfer.grants import GRANT_S, GrantBook, GrantRefused, Source
from shared.transfer.protocol import Header


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


def header_for(grant, **changes):
    header = Header(len(grant.sources), grant.transfer_id, grant.token, grant.block_bytes, 0)
    return dataclasses.replace(header, **changes)


async def test_a_grant_is_claimed_once(book):
    grant = book.issue(sources())
    assert book.claim(header_for(grant), endpoint="e") is grant
    assert grant.endpoint == "e"
    with pytest.raises(GrantRefused, match="unknown or used"):
        book.claim(header_for(grant), endpoint="e")


async def test_a_wrong_token_is_refused_and_spoils_nothing(book):
    grant = book.issue(sources())
    with pytest.raises(GrantRefused, match="wrong token"):
        book.claim(header_for(grant, token=b"x" * 32), endpoint="thief")
    assert book.claim(header_for(grant), endpoint="owner") is grant


async def test_an_expired_grant_is_refused(book, clock):
    grant = book.issue(sources())
    clock.now += GRANT_S
    with pytest.raises(GrantRefused, match="expired"):
        book.claim(header_for(grant), endpoint="e")
    assert len(book) == 0


@pytest.mark.parametrize("changes", [{"num_blocks": 3}, {"num_blocks": 1}, {"block_bytes": 65}])
async def test_a_grant_covers_exactly_what_was_promised(book, changes):
    grant = book.issue(sources())
    with pytest.raises(GrantRefused, match="granted 2 x 64 bytes"):
        book.claim(header_for(grant, **changes), endpoint="e")


async def test_a_revoked_grant_is_worthless(book):
    grant = book.issue(sources())
    book.revoke(grant)
    book.revoke(grant)
    with pytest.raises(GrantRefused):
        book.claim(header_for(grant), endpoint="e")


async def test_grants_have_names_and_tokens_of_their_own(book):
    grants = [book.issue(sources()) for _ in range(50)]
    assert len({grant.transfer_id for grant in grants}) == len({grant.token for grant in grants}) == 50
