"""The other workers, as the directory names them. Nobody dials an address that did not come from here."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as rpc
from shared.directory.client import Directory
from shared.errors import ConfigurationError
from shared.identity import Fingerprint
from shared.rpc import ChannelPool, PeerRole, TlsFiles

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PrefillPeer:
    """A prefill worker that can be called now, and whose kv_transfer can be fetched from."""

    worker_id: str
    transfer_incarnation: str
    stub: rpc.WorkerAsyncStub


class Peers:
    """Resolves names to open channels; one channel per incarnation, closed when the incarnation is gone."""

    def __init__(self, directory: Directory, fingerprint: Fingerprint, tls: TlsFiles | None = None) -> None:
        """With `tls`, whoever answers at a record's address must prove to be that record's worker."""
        self._directory = directory
        self._fingerprint = fingerprint
        self._channels = ChannelPool[tuple[str, str]](tls)

    def prefill_worker(self, ref: pb.PeerRef) -> PrefillPeer | None:
        """The peer, or None when the directory has no such incarnation, or one of another fingerprint."""
        record = next((r for r in self._directory.workers() if r.worker_id == ref.worker_id), None)
        transfer = next((r for r in self._directory.transfers() if r.worker_id == ref.worker_id), None)
        if record is None or transfer is None or record.role != "prefill" or record.incarnation != ref.incarnation:
            return None
        if record.fingerprint != self._fingerprint or transfer.fingerprint != self._fingerprint:
            return None
        key = (str(record.worker_id), str(record.incarnation))
        try:
            channel = self._channels.channel(key, record.address, (PeerRole.PREFILL, record.worker_id))
        except ConfigurationError as exc:
            log.error("peer_not_dialled", peer=record.worker_id, error=exc.message)
            return None
        return PrefillPeer(record.worker_id, transfer.incarnation, rpc.WorkerStub(channel))

    async def close(self) -> None:
        """Closes every channel."""
        await self._channels.close()

    async def run(self) -> None:
        """Closes channels to incarnations that left the directory, until cancelled."""
        while True:
            await self._directory.wait_for_change()
            live = {(str(r.worker_id), str(r.incarnation)) for r in self._directory.workers()}
            for key in self._channels.keys - live:
                await self._channels.forget(key)
