"""`redis+cluster://`: a Redis Cluster, found through whichever of the named nodes answers."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

from redis.asyncio import RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

CLUSTER_MARK = "+cluster"

_DEFAULT_PORT = 6379


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
