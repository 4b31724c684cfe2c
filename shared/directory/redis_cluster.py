"""`redis+cluster://`: a Redis Cluster, found through whichever of the named nodes answers."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit, urlunsplit

from redis.asyncio import RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

CLUSTER_MARK = "+cluster"

_DEFAULT_PORT = 6379


class ClusterMap:
    """Which node has which slots, as a client learns it before its first command.

    A task of its own reads it. Of a large cluster, or on a busy machine, that takes longer than a command may, and were
    it cut off with each command it would begin anew for ever.
    """

    def __init__(self, client: RedisCluster) -> None:
        self._client = client
        self._reading: asyncio.Task[RedisCluster] | None = None

    @property
    def is_being_read(self) -> bool:
        """Its reader has not ended; it does, because it waits for no answer longer than the client does."""
        return self._reading is not None and not self._reading.done()

    async def known(self) -> None:
        """Returns once the client knows the map; whoever gives up leaves the reader alone.

        Raises:
            RedisError, RedisClusterException, OSError: No node could be asked.
        """
        if self._reading is None:
            self._reading = asyncio.create_task(self._client.initialize(), name="cluster-map")
        await asyncio.shield(self._reading)

    async def forget(self) -> None:
        """The next command has it read anew: a master may be gone."""
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


def connect_cluster(url: str, timeout_s: float) -> RedisCluster:
    """A client of the whole cluster; connects to nothing yet.

    Args:
        url: `redis+cluster://[user:password@]host[:port][,host[:port]...]`, or `rediss+cluster://` for TLS to all of
            them; a PEM file of authorities is `?ssl_ca_certs=`. Nodes that are not named are learnt from those named.
        timeout_s: For connecting and for each answer.

    Raises:
        ValueError: No such URL.
    """
    parts = urlsplit(url.replace(CLUSTER_MARK, "", 1))
    credentials, at, hosts = parts.netloc.rpartition("@")
    first, *others = (_host_and_port(host) for host in hosts.split(","))
    one_node = parts._replace(netloc=f"{credentials}{at}{first[0]}:{first[1]}")
    return RedisCluster.from_url(
        urlunsplit(one_node),
        startup_nodes=[ClusterNode(host, port) for host, port in others],
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
    )


def _host_and_port(text: str) -> tuple[str, int]:
    address = urlsplit(f"//{text}")
    if not address.hostname:
        raise ValueError(f"no host in {text!r}")
    return address.hostname, address.port or _DEFAULT_PORT
