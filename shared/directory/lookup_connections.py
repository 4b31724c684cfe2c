"""Connections that only look values up: kept while idle, and asked without redis-py's pool and its way of writing.

Its locks, retries and telemetry cost a request two to three times what the question and the answer do, and its writer
in Python half as much as those.
"""

from __future__ import annotations

from collections.abc import Sequence

import hiredis
from redis.asyncio import Connection, ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError


class LookupConnections:
    """As many as lookups were under way at one time; whoever asks bounds that, and the time."""

    def __init__(self, pool: ConnectionPool) -> None:
        """Connects to nothing yet.

        Args:
            pool: Says how connections are made; none of them is taken from it.
        """
        self._pool = pool
        self._idle: list[Connection] = []

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Values of string keys, in order.

        Raises:
            RedisError, OSError: No answer.
        """
        while self._idle:
            try:
                return await self._ask(self._idle.pop(), keys)
            except (RedisConnectionError, OSError):
                continue  # it was closed while it was idle, as one is where Redis was started anew
        fresh: Connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        return await self._ask(fresh, keys)

    async def close(self) -> None:
        """Closes what is idle."""
        while self._idle:
            await self._idle.pop().disconnect(nowait=True)

    async def _ask(self, connection: Connection, keys: Sequence[bytes]) -> list[bytes | None]:
        try:
            command = hiredis.pack_command(("MGET", *keys))  # type: ignore[arg-type]  # its stub knows tuples of one only
            await connection.send_packed_command(command, check_health=False)
            values: list[bytes | None] = await connection.read_response()
        except BaseException:
            await connection.disconnect(nowait=True)  # a late answer would be taken for that to the next question
            raise
        self._idle.append(connection)
        return values
