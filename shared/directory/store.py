"""The connection to Redis: bounded in time, guarded by a breaker, the same on one server and on a cluster.

Two ways in. `lookup` is for the request path: one short time-out, no exception, nothing at all while the breaker is
open. `run` is for background work: patient, raises `StoreDown`, and keeps trying, so it is what closes the breaker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import structlog
from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError

from shared.directory.breaker import CircuitBreaker
from shared.directory.lookup_connections import LookupConnections
from shared.directory.redis_cluster import CLUSTER_MARK, ClusterMap, connect_cluster
from shared.directory.sentinel import SENTINEL_MARK, connect_sentinel
from shared.errors import ConfigurationError

Command = tuple[bytes | str | int, ...]

_BREAK_S = 1.0
_MAX_CONNECTIONS = 16
_LATE_LOOP_S = 0.02
# The second is what a cluster says of which no node can be reached; to redis-py it is no RedisError.
_FAILURES = (RedisError, RedisClusterException, OSError)

_log = structlog.get_logger(__name__)


class StoreDown(Exception):
    """Redis did not answer in time, or refused; never leaves `shared.directory`."""


class RedisStore:
    """Pipelines of commands to one Redis or one Redis Cluster.

    Owned by one event loop. Connects when first used and reconnects by itself.
    """

    def __init__(self, url: str, *, lookup_timeout_s: float, background_timeout_s: float) -> None:
        """Checks the URL; connects to nothing.

        Args:
            url: `redis://`, `rediss://` (TLS) or `unix://`; `redis+cluster://host:port,host:port` names some nodes of a
                cluster, `redis+sentinel://host:port,host:port/service` the Sentinels of one service.
            lookup_timeout_s: What a request may lose to Redis at most.
            background_timeout_s: For heartbeats and publishing.

        Raises:
            ConfigurationError: Not such a URL.
        """
        self._url = url
        self._lookup_timeout_s = lookup_timeout_s
        self._background_timeout_s = background_timeout_s
        self._breaker = CircuitBreaker(open_s=_BREAK_S)
        # Every kind of client opens a connection per command in flight; only one of them knows a bound.
        self._turns = asyncio.Semaphore(_MAX_CONNECTIONS)
        try:
            self._client = self._connect()
        except (ValueError, RedisError) as exc:
            raise ConfigurationError(f"redis_url: {exc}") from exc
        self._map = ClusterMap(self._client) if isinstance(self._client, RedisCluster) else None
        # Behind Sentinels, and on a cluster, the client knows which server is to be asked now.
        self._lookups: LookupConnections | None = None
        if isinstance(self._client, Redis) and SENTINEL_MARK not in url.partition("://")[0]:
            self._lookups = LookupConnections(self._client.connection_pool)

    @property
    def is_down(self) -> bool:
        """The breaker is open: lookups are answered with nothing."""
        return self._breaker.is_open

    async def lookup(self, keys: Sequence[bytes]) -> list[bytes | None] | None:
        """Values of string keys, in order; None where Redis is down or too slow."""
        if self._breaker.is_open:
            return None
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            async with asyncio.timeout(self._lookup_timeout_s):
                return await self._get_many(keys)
        except TimeoutError as exc:
            # Where this process itself was held up, the time-out says nothing about Redis.
            if loop.time() - started < self._lookup_timeout_s + _LATE_LOOP_S:
                self._failed(exc)
        except _FAILURES as exc:
            self._failed(exc)
        return None

    async def run(self, commands: Sequence[Command]) -> list[Any]:
        """Sends commands in one pipeline, not atomically; replies in order.

        Raises:
            StoreDown: Any of them failed.
        """
        try:
            async with asyncio.timeout(self._background_timeout_s):
                replies = await self._pipeline(commands)
        except (*_FAILURES, TimeoutError) as exc:
            self._failed(exc)
            if self._map is not None and not self._map.is_being_read:
                await self._close_connections()  # the client finds out anew who has which slots: a master may be gone
            raise StoreDown(str(exc) or type(exc).__name__) from exc
        if self._breaker.succeeded():
            _log.info("directory_recovered")
        return replies

    async def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Values of string keys, in order, as background work.

        Raises:
            StoreDown: No answer.
        """
        if not keys:
            return []
        if self._map is not None:
            return await self.run([("GET", key) for key in keys])
        replies = await self.run([("MGET", *keys)])
        values: list[bytes | None] = replies[0]
        return values

    async def close(self) -> None:
        """Closes every connection; never raises for a Redis that is gone."""
        await self._close_connections()

    async def _close_connections(self) -> None:
        try:
            async with asyncio.timeout(self._background_timeout_s):
                if self._lookups is not None:
                    await self._lookups.close()
                if self._map is not None:
                    await self._map.forget()
                await self._client.aclose()
        except (*_FAILURES, TimeoutError) as exc:
            _log.debug("directory_close_failed", error=str(exc))

    async def _get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if self._map is not None:
            return await self._pipeline([("GET", key) for key in keys])
        async with self._turns:
            if self._lookups is not None:
                return await self._lookups.get_many(keys)
            values: list[bytes | None] = await self._client.execute_command("MGET", *keys)
        return values

    async def _pipeline(self, commands: Sequence[Command]) -> list[Any]:
        pipeline = self._client.pipeline() if self._map is not None else self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        async with self._turns:
            if self._map is not None:
                await self._map.known()
            replies: list[Any] = await pipeline.execute()
        return replies

    def _failed(self, exc: BaseException) -> None:
        if self._breaker.failed():
            _log.warning("directory_unreachable", error=str(exc) or type(exc).__name__)

    def _connect(self) -> Redis | RedisCluster:
        if CLUSTER_MARK in self._url.partition("://")[0]:
            return connect_cluster(self._url, self._background_timeout_s)
        if SENTINEL_MARK in self._url.partition("://")[0]:
            return connect_sentinel(self._url, self._background_timeout_s)
        return self._connect_single()

    def _connect_single(self) -> Redis:
        pool = BlockingConnectionPool.from_url(
            self._url,
            max_connections=_MAX_CONNECTIONS,
            timeout=None,  # our own time-outs bound the wait for a connection too
            socket_timeout=None,
            socket_connect_timeout=None,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
        )
        return Redis.from_pool(pool)
