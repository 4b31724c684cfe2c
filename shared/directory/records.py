"""What processes announce about themselves: one record each, JSON in Redis, alive for three heartbeats."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from shared.identity import Fingerprint, Incarnation, WorkerId

Role = Literal["prefill", "decode"]

NO_HOLDER_INDEX = -1
"""A kv_transfer that has not been given its number yet: Redis was not there to ask."""


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """How busy a worker is, as of its last heartbeat.

    Attributes:
        queued_prefill_tokens: Prompt tokens admitted or waiting, not yet computed.
        prefill_tokens_per_s: Measured, moving average; 0 = not measured yet.
        transfer_bytes_per_s: Likewise, of fetches.
        neighbour_slowdown: Steps that decode take so many times as long beside a remote prefill; 1 = not measured yet.
    """

    running: int = 0
    waiting: int = 0
    waiting_for_kv: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    used_blocks: int = 0
    pinned_blocks: int = 0
    quarantined_blocks: int = 0
    total_blocks: int = 0
    queued_prefill_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    transfer_bytes_per_s: float = 0.0
    neighbour_slowdown: float = 1.0


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A prefill or decode worker.

    Attributes:
        model: The served name.
        address: "host:port" of its `Worker` service.
        block_bytes: Of one KV block, all layers.
        draining: Finishes what it has and takes nothing new.
        ready: What its `/ready` says.
        hung: It has work, and no step ends.
        started_at: Unix seconds.
    """

    worker_id: WorkerId
    role: Role
    model: str
    fingerprint: Fingerprint
    incarnation: Incarnation
    address: str
    pid: int
    block_size: int
    max_model_len: int
    vocab_size: int
    block_bytes: int
    started_at: float
    load: WorkerLoad = field(default_factory=WorkerLoad)
    draining: bool = False
    ready: bool = False
    hung: bool = False

    @property
    def key(self) -> str:
        """Name under which the record is kept; a restarted process replaces its predecessor."""
        return self.worker_id


@dataclass(frozen=True, slots=True)
class TransferRecord:
    """The kv_transfer beside a worker.

    Attributes:
        worker_id: Of the worker it stands beside.
        incarnation: Of the kv_transfer process, not the worker's.
        fingerprint: Of the blocks it holds; "" until a worker attached.
        fetch_address: "host:port" of its `KvFetch` service.
        holder_index: Its bit in the block hints, or `NO_HOLDER_INDEX`.
    """

    worker_id: WorkerId
    incarnation: Incarnation
    fingerprint: Fingerprint
    fetch_address: str
    holder_index: int
    pid: int

    @property
    def key(self) -> str:
        """Name under which the record is kept."""
        return self.worker_id


@dataclass(frozen=True, slots=True)
class GatewayRecord:
    """A gateway; `address` is "host:port" of its HTTP listener."""

    gateway_id: str
    incarnation: Incarnation
    address: str
    pid: int

    @property
    def key(self) -> str:
        """Name under which the record is kept."""
        return self.gateway_id


Record = WorkerRecord | TransferRecord | GatewayRecord
RecordType = type[WorkerRecord] | type[TransferRecord] | type[GatewayRecord]


def encode_record(record: Record) -> bytes:
    """The record as JSON."""
    return msgspec.json.encode(record)


def decode_record(cls: RecordType, raw: bytes) -> Record:
    """Inverse of `encode_record`; fields that this version doesn't know are ignored.

    Raises:
        ValueError: Not JSON, a field is missing, or of the wrong type.
    """
    record: Record = msgspec.json.decode(raw, type=cls)
    return record
