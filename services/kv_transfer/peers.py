"""Other workers' kv_transfers, as the directory names them. Nobody dials an address that did not come from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from services.kv_transfer.fetch_stream import FetchStream
from shared.directory.records import TransferRecord
from shared.errors import FingerprintMismatch, StaleIncarnation, WorkerLost
from shared.identity import Fingerprint
from shared.rpc import ChannelPool, PeerRole, TlsFiles


class TransferPeers:
    """Resolves holders to open channels; one channel per incarnation, closed when the incarnation left the directory.

    Args:
        transfers: The directory's present snapshot.
        tls: With it, whoever answers at a record's address must prove to be that record's kv_transfer.
    """

    def __init__(self, transfers: Callable[[], Sequence[TransferRecord]], tls: TlsFiles | None = None) -> None:
        self._transfers = transfers
        self._channels = ChannelPool[tuple[str, str]](tls)
        self._streams: dict[tuple[str, str], FetchStream] = {}
        self._absent: set[tuple[str, str]] = set()

    def resolve(self, holder_id: str, incarnation: str, fingerprint: Fingerprint) -> TransferRecord:
        """The holder's record.

        Args:
            holder_id: Worker id.
            fingerprint: Of the blocks that are wanted.
            incarnation: Of the holder's kv_transfer, as the caller knows it; "" = whichever lives now.

        Raises:
            WorkerLost: The directory knows no such holder.
            StaleIncarnation: It knows another incarnation.
            FingerprintMismatch: It holds blocks of another kind.
        """
        record = next((record for record in self._transfers() if record.worker_id == holder_id), None)
        if record is None:
            raise WorkerLost(f"the directory knows no kv_transfer of {holder_id}")
        if incarnation not in ("", record.incarnation):
            raise StaleIncarnation(f"{holder_id} is {record.incarnation} now, not {incarnation}")
        if record.fingerprint != fingerprint:
            raise FingerprintMismatch(f"{holder_id} holds blocks of {record.fingerprint}, not of {fingerprint}")
        return record

    def stream(self, record: TransferRecord) -> FetchStream:
        """Where to ask a holder; lives until its channel is closed."""
        key = (str(record.incarnation), record.fetch_address)
        channel = self._channels.channel(key, record.fetch_address, (PeerRole.TRANSFER, record.worker_id))
        stream = self._streams.get(key)
        if stream is None or stream.is_over or stream.channel is not channel:
            if stream is not None:
                stream.retire()  # it was opened with an older certificate
            stream = self._streams[key] = FetchStream(channel)
        return stream

    async def forget_gone(self) -> None:
        """Closes the channels of incarnations that have been absent from the directory since the last call."""
        live = {(str(record.incarnation), record.fetch_address) for record in self._transfers()}
        absent = self._channels.keys - live
        # Only at the second look: a channel may carry a transfer of a holder that is late with its heartbeat.
        for key in absent & self._absent:
            if key in self._streams:
                self._streams.pop(key).close()
            await self._channels.forget(key)
        self._absent = absent

    async def close(self) -> None:
        """Closes every channel."""
        for stream in self._streams.values():
            stream.close()
        await self._channels.close()
