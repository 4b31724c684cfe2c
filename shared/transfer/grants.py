"""Grants: the right to receive certain blocks once, soon."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shared.identity import BlockHash
from shared.transfer.checksum import Block
from shared.transfer.protocol import MAX_BLOCKS, TOKEN_BYTES, TRANSFER_ID_BYTES, Header
from shared.transfer.transport import Endpoint

GRANT_S = 10.0
"""How long a grant waits to be claimed."""


class GrantRefused(Exception):
    """The peer may not have these blocks: unknown, used, expired, or not its grant. Says which, for the log."""


@dataclass(frozen=True, slots=True)
class Source:
    """A block that will be sent.

    Attributes:
        block: Its bytes; whoever issued the grant keeps them in place until the transfer is over.
        checksum: As noted when the block was stored; None for a block that has none yet.
    """

    block_hash: BlockHash
    block: Block
    checksum: int | None = None


@dataclass(eq=False, slots=True)
class Grant:
    """One transfer, from its promise to its end. Owned by the call that issued it.

    Attributes:
        endpoint: Serving it; set once, when it is claimed.
        finished: Done when the sender has let go of every source: True if all was sent.
        corrupt: Blocks whose bytes no longer match the checksum they were stored with.
    """

    transfer_id: bytes
    token: bytes
    sources: Sequence[Source]
    expires_s: float
    finished: asyncio.Future[bool]
    endpoint: Endpoint | None = None
    corrupt: list[BlockHash] = field(default_factory=list)

    @property
    def block_bytes(self) -> int:
        """Of every source."""
        return int(self.sources[0].block.nbytes)


class GrantBook:
    """The grants of one sender that nobody has claimed yet. Single use: claiming takes a grant out of the book."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: dict[bytes, Grant] = {}

    def __len__(self) -> int:
        return len(self._open)

    def issue(self, sources: Sequence[Source]) -> Grant:
        """Promises `sources`, all of one size, to whoever shows the token within `GRANT_S`.

        The caller keeps them unchanged until `finished`, or until it has revoked the grant and closed its endpoint.
        """
        assert 1 <= len(sources) <= MAX_BLOCKS
        assert len({source.block.nbytes for source in sources}) == 1
        grant = Grant(
            transfer_id=secrets.token_bytes(TRANSFER_ID_BYTES),
            token=secrets.token_bytes(TOKEN_BYTES),
            sources=sources,
            expires_s=self._clock() + GRANT_S,
            finished=asyncio.get_running_loop().create_future(),
        )
        self._open[grant.transfer_id] = grant
        return grant

    def claim(self, header: Header, endpoint: Endpoint) -> Grant:
        """Takes the grant that `header` names out of the book, for `endpoint` to serve.

        Raises:
            GrantRefused: There is no such grant (any more), or the header doesn't fit it.
        """
        grant = self._open.get(header.transfer_id)
        if grant is None:
            raise GrantRefused("unknown or used transfer")
        # A wrong token leaves the grant to its rightful owner.
        if not hmac.compare_digest(grant.token, header.token):
            raise GrantRefused("wrong token")
        del self._open[header.transfer_id]
        if self._clock() >= grant.expires_s:
            raise GrantRefused("expired transfer")
        if header.num_blocks != len(grant.sources) or header.block_bytes != grant.block_bytes:
            raise GrantRefused(
                f"asks for {header.num_blocks} x {header.block_bytes} bytes, "
                f"granted {len(grant.sources)} x {grant.block_bytes} bytes"
            )
        grant.endpoint = endpoint
        return grant

    def revoke(self, grant: Grant) -> None:
        """Makes an unclaimed grant worthless; a claimed one is stopped by closing its endpoint."""
        self._open.pop(grant.transfer_id, None)
