"""Channels to the members of a fleet, one each, opened when first needed and again when certificates were renewed."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from typing import Generic, TypeVar

import grpc

from shared.rpc.channel import open_channel
from shared.rpc.tls import PeerRole, TlsFiles

RENEWAL_GRACE_S = 60.0
"""Calls that were open when a certificate was renewed get this long on the old channel."""

K = TypeVar("K", bound=Hashable)


class ChannelPool(Generic[K]):
    """Owned by one event loop.

    Args:
        tls: With it, whoever answers at an address must prove to be the member that is meant.
    """

    def __init__(self, tls: TlsFiles | None = None) -> None:
        self._tls = tls
        self._channels: dict[K, tuple[tuple[int, ...], grpc.aio.Channel]] = {}
        self._retiring: set[asyncio.Task[None]] = set()

    def channel(self, key: K, target: str, peer: tuple[PeerRole, str]) -> grpc.aio.Channel:
        """The channel of a member; the pool closes it.

        Args:
            key: Of this life of the member; another key is another channel.
            target: "host:port", used when the channel is opened.
            peer: Who is meant, see `open_channel`.

        Raises:
            ConfigurationError: The certificate files cannot be used.
        """
        version = self._tls.version if self._tls else ()
        if key in self._channels:
            known, channel = self._channels[key]
            if known == version:
                return channel
            self._retire(channel)
        channel = open_channel(target, tls=self._tls, peer=peer)
        self._channels[key] = version, channel
        return channel

    @property
    def keys(self) -> set[K]:
        """Of the channels that exist."""
        return set(self._channels)

    async def forget(self, key: K) -> None:
        """Closes a member's channel; its open calls end."""
        _, channel = self._channels.pop(key)
        await channel.close()

    async def close(self) -> None:
        """Closes every channel."""
        for task in self._retiring:
            task.cancel()
        for key in self.keys:
            await self.forget(key)

    def _retire(self, channel: grpc.aio.Channel) -> None:
        task = asyncio.ensure_future(channel.close(RENEWAL_GRACE_S))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
