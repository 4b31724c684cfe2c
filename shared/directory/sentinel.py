"""`redis+sentinel://`: the Redis that Sentinels say is the master now, also after the next failover."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import TimeoutError as RedisTimeoutError

SENTINEL_MARK = "+sentinel"

_DEFAULT_PORT = 26379


class _OneSentinel(Redis):
    """Given up after `limit_s` seconds, connecting included: then the next one is asked.

    redis-py's own `socket_timeout` is for each step, and with `asyncio.wait_for`, which in Python 3.11 swallows a
    cancellation that comes as what it waits for ends.
    """

    limit_s: float

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        try:
            async with asyncio.timeout(self.limit_s):
                return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except TimeoutError as exc:
            raise RedisTimeoutError(f"no answer within {self.limit_s:g} s") from exc


def connect_sentinel(url: str, timeout_s: float) -> Redis:
    """A client of the master of one service; connects to nothing yet.

    Args:
        url: `redis+sentinel://[user:password@]host[:port][,host[:port]...]/service[/database]`, or `rediss+sentinel://`
            for TLS to all of them. `?sentinel_password=` (and `sentinel_username`) is the Sentinels' own; a PEM file of
            authorities is `?ssl_ca_certs=`.
        timeout_s: Until the master must have answered; each Sentinel has its share of that, so that some which say
            nothing are not in the way of one that does.

    Raises:
        ValueError: No such URL.
    """
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    service, _, database = parts.path.strip("/").partition("/")
    if not hosts or not service or (database and not database.isdigit()):
        raise ValueError("expected redis+sentinel://host:port,host:port/service/database")
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    security: dict[str, Any] = {"ssl": True} if parts.scheme.startswith("rediss") else {}
    if ca := options.get("ssl_ca_certs"):
        security["ssl_ca_certs"] = ca
    asking = {
        "username": options.get("sentinel_username"),
        "password": options.get("sentinel_password"),
        "socket_timeout": None,
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
        **security,
    }
    addresses = [_host_and_port(host) for host in hosts.split(",")]
    sentinel = Sentinel([])  # type: ignore[no-untyped-call]
    for host, port in addresses:
        one = _OneSentinel(host=host, port=port, **asking)
        one.limit_s = timeout_s / (len(addresses) + 1)  # the master has a share as well
        sentinel.sentinels.append(one)
    master: Redis = sentinel.master_for(
        service,
        db=int(database or 0),
        username=unquote(user) or None,
        password=unquote(password) or None,
        socket_timeout=None,  # our own time-outs bound it
        socket_connect_timeout=timeout_s,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        **security,
    )
    return master


def _host_and_port(text: str) -> tuple[str, int]:
    address = urlsplit(f"//{text}")
    if not address.hostname:
        raise ValueError(f"no host in {text!r}")
    return address.hostname, address.port or _DEFAULT_PORT
