"""Grants: the right of one requester to receive certain blocks once, soon. `claims` says how they are bound."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from shared.identity import BlockHash
from shared.transfer.checksum import Block
from shared.transfer.claims import KEY_BYTES, TRANSFER_ID_BYTES, Claims
from shared.transfer.protocol import MAX_BLOCKS, Header
from shared.transfer.transport import Endpoint

GRANT_S = 10.0
"""How long a grant waits to be claimed."""


def _always() -> bool:
    return True


class GrantRefused(Exception):
    """The peer may not have these blocks: unknown, used, expired, or not its grant. Says which, for the log."""


class Source(NamedTuple):  # made for every block of a fetch, in a fifth of a dataclass' time
    """A block that will be sent.

    Attributes:
        block: Its bytes; whoever issued the grant keeps them in place until the transfer is over.
        checksum: As noted when the block was stored; None for a block that has none yet.
        is_suspect: It was stored long ago: compare its bytes with the checksum once more.
        is_intact: Asked when it was sent: whether its bytes were the block's all the while.
    """

    block_hash: BlockHash
    block: Block
    checksum: int | None = None
    is_suspect: bool = True
    is_intact: Callable[[], bool] = _always


@dataclass(eq=False, slots=True)
class Grant:
    """One transfer, from its promise to its end. Owned by the call that issued it.

    Attributes:
        claims: What it covers.
        key: Entitles to it.
        endpoint: Serving it; set once, when it is claimed.
        finished: Done when the sender has let go of every source: True if all was sent.
        corrupt: Blocks whose bytes no longer match the checksum they were stored with.
    """

    claims: Claims
    key: bytes
    sources: Sequence[Source]
    finished: asyncio.Future[bool]
    endpoint: Endpoint | None = None
    corrupt: list[BlockHash] = field(default_factory=list)

    @property
    def transfer_id(self) -> bytes:
        """Names it; unique."""
        return self.claims.transfer_id

    @property
    def block_bytes(self) -> int:
        """Of every source."""
        return self.claims.block_bytes


class GrantBook:
    """The grants of one sender that nobody has claimed yet. Single use: claiming takes a grant out of the book."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._secret = secrets.token_bytes(KEY_BYTES)
        self._open: dict[bytes, Grant] = {}

    def __len__(self) -> int:
        return len(self._open)

    def issue(self, sources: Sequence[Source], *, requester: str, fingerprint: str) -> Grant:
        """Promises `sources`, all of one size, to whoever proves within `GRANT_S` to have been given the grant's key.

        The caller keeps them unchanged until `finished`, or until it has revoked the grant and closed its endpoint.

        Args:
            sources: In the order in which they will be sent.
            requester: Id of the worker that they are for.
            fingerprint: Of the blocks.
        """
        assert 1 <= len(sources) <= MAX_BLOCKS
        assert len({source.block.nbytes for source in sources}) == 1
        claims = Claims.of(
            secrets.token_bytes(TRANSFER_ID_BYTES),
            requester=requester,
            fingerprint=fingerprint,
            block_hashes=[source.block_hash for source in sources],
            block_bytes=int(sources[0].block.nbytes),
            expires_ms=int((self._clock() + GRANT_S) * 1000),
        )
        grant = Grant(
            claims=claims,
            key=claims.key(self._secret),
            sources=sources,
            finished=asyncio.get_running_loop().create_future(),
        )
        self._open[grant.transfer_id] = grant
        return grant

    def claim(self, header: Header, endpoint: Endpoint) -> Grant:
        """Takes the grant that `header` names out of the book, for `endpoint` to serve.

        Raises:
            GrantRefused: The header's claims are not what this book granted, its maker doesn't know the key, or the
                grant was used, revoked or has expired.
        """
        claims = header.claims
        # Derived from what the header claims: a changed claim gives another key. The grant is left to its owner.
        if not header.is_signed_with(claims.key(self._secret)):
            raise GrantRefused("not granted here: forged or changed claims")
        grant = self._open.pop(claims.transfer_id, None)
        if grant is None:
            raise GrantRefused("used or revoked transfer")
        assert grant.claims == claims, "two grants under one name"
        if int(self._clock() * 1000) >= claims.expires_ms:
            raise GrantRefused("expired transfer")
        grant.endpoint = endpoint
        return grant

    def revoke(self, grant: Grant) -> None:
        """Makes an unclaimed grant worthless; a claimed one is stopped by closing its endpoint."""
        self._open.pop(grant.transfer_id, None)
