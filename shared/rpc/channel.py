"""Channels: the client side, and the HTTP/2 options that both sides must agree on."""

from __future__ import annotations

from pathlib import Path

import grpc

from shared.errors import ConfigurationError
from shared.rpc.tls import PeerRole, TlsFiles, peer_name

PING_AFTER_S = 0.5
"""A peer that is silent for so long is pinged; by clients no sooner than a second after the ping before, says gRPC."""
PING_TIMEOUT_S = 0.8
"""Without an answer for so long it is given up: a server that fell silent after 0.8 to 1.8 s, hence.

gRPC's own threads answer, beside a busy event loop or a held GIL.
"""

MAX_MESSAGE_BYTES = 64 << 20
"""A bound, not a budget: a million-token prompt is about 5 MiB."""

# sun_path holds 108 bytes on Linux with its terminating zero.
_MAX_SOCKET_PATH_BYTES = 107


def transport_options() -> list[tuple[str, int]]:
    """Options for channels and servers: keepalive pings, also on idle connections, and message bounds."""
    timeout_ms = int(PING_TIMEOUT_S * 1000)
    return [
        ("grpc.keepalive_time_ms", int(PING_AFTER_S * 1000)),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        # An unanswered ping has a time-out of its own, one minute by default, that hides the keepalive's.
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        # 0 = no limit. The default falls silent after two pings without data, as a call in a long queue would see.
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ]


def unix_target(path: str | Path) -> str:
    """The gRPC target of a Unix socket.

    Raises:
        ConfigurationError: The path is longer than a socket address can hold.
    """
    absolute = str(Path(path).absolute())
    if len(absolute.encode()) > _MAX_SOCKET_PATH_BYTES:
        raise ConfigurationError(
            f"Unix socket path of {len(absolute.encode())} bytes exceeds {_MAX_SOCKET_PATH_BYTES}: {absolute}; "
            "choose a shorter directory"
        )
    return f"unix:{absolute}"


def open_channel(
    target: str, *, tls: TlsFiles | None = None, peer: tuple[PeerRole, str] | None = None
) -> grpc.aio.Channel:
    """Opens a channel; connects on first use and reconnects by itself, within 100 ms to 1 s of the peer's return.

    Over a Unix socket, where a try costs next to nothing, it is 100 ms always. A call on a channel whose peer is away
    fails at once as `WorkerLost`, unless made with `wait_for_ready=True`.

    Args:
        target: "host:port", or `unix_target(path)`.
        tls: This process's identity; None = plaintext, as on Unix sockets.
        peer: Role and id of the member that is meant; with `tls`, whoever answers must prove to be that one, whatever
            the address is. None = the address itself must be in the certificate.

    Returns:
        A channel that the caller closes (`async with`, or `await channel.close()`); closing cancels its open calls.

    Raises:
        ConfigurationError: The files of `tls` cannot be used (any more).
    """
    options = [
        *transport_options(),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 100 if target.startswith("unix:") else 1000),
        # A new channel to a restarted peer must not inherit the old channel's broken connection and its back-off.
        ("grpc.use_local_subchannel_pool", 1),
        # Peers are on the private network; a proxy set for the hub's downloads is not meant for them.
        ("grpc.enable_http_proxy", 0),
    ]
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options)
    named = [("grpc.ssl_target_name_override", peer_name(*peer))] if peer else []
    return grpc.aio.secure_channel(target, tls.channel_credentials(), options=[*options, *named])
