"""Who is there: records that live as long as their heartbeat, and everybody's last-known snapshot of them.

All keys carry one hash tag, so that a cluster keeps them in one slot and one MGET reads them:

    tandem:{members}:generation      random; its absence means that Redis lost its data
    tandem:{members}:worker          set of worker ids
    tandem:{members}:worker:<id>     the record, expires after three heartbeats
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar, cast

import structlog

from shared.directory.records import (
    GatewayRecord,
    Record,
    RecordType,
    TransferRecord,
    WorkerRecord,
    decode_record,
    encode_record,
)
from shared.directory.store import Command, RedisStore, StoreDown

R = TypeVar("R", WorkerRecord, TransferRecord, GatewayRecord)

LIFETIME_HEARTBEATS = 3

_PREFIX = b"tandem:{members}:"
_GENERATION_KEY = _PREFIX + b"generation"
_KINDS: dict[RecordType, bytes] = {WorkerRecord: b"worker", TransferRecord: b"transfer", GatewayRecord: b"gateway"}

# Only one's own record: a successor under the same name may have announced itself already.
_WITHDRAW_SCRIPT = (
    "if redis.call('GET',KEYS[1])==ARGV[1] then redis.call('DEL',KEYS[1]) redis.call('SREM',KEYS[2],ARGV[2]) end"
)

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Announcement:
    """`written` is what Redis holds as far as this process knows."""

    current: Callable[[], Record]
    written: tuple[Record, bytes] | None = None


class Membership:
    """Announces this process's records and keeps a snapshot of everybody's.

    The snapshot outlives Redis. After an outage or a flush the records that are missing count as present until their
    owners had time to announce themselves again; only then does absence mean death.
    """

    def __init__(
        self,
        store: RedisStore,
        *,
        heartbeat_s: float,
        watch: Collection[RecordType],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._lifetime_s = LIFETIME_HEARTBEATS * heartbeat_s
        self._watch = tuple(watch)
        self._clock = clock
        self._announcements: list[_Announcement] = []
        self._snapshot: dict[RecordType, dict[str, Record]] = {cls: {} for cls in self._watch}
        self._records: dict[RecordType, tuple[Record, ...]] = dict.fromkeys(self._watch, ())
        self._generation: bytes | None = None
        self._grace_until = 0.0
        self._changed = asyncio.Event()

    def records(self, cls: type[R]) -> tuple[R, ...]:
        """Last-known records of one kind: the same tuple as before unless something changed."""
        return cast("tuple[R, ...]", self._records[cls])

    async def wait_for_change(self) -> None:
        """Returns when a refresh brought a snapshot that differs in anything from the one before."""
        await self._changed.wait()

    async def announce(self, current: Callable[[], Record]) -> None:
        """Keeps the record alive from now on, with the value of `current()` at each heartbeat; never raises."""
        self._announcements.append(_Announcement(current))
        await self.heartbeat_now()

    async def heartbeat_now(self) -> None:
        """Writes the announced records now, e.g. because draining began; never raises."""
        try:
            await self._write()
        except StoreDown:
            return  # the next heartbeat that gets through writes them

    async def withdraw(self) -> None:
        """Stops announcing and removes the records that still are this process's; never raises."""
        announcements, self._announcements = self._announcements, []
        commands: list[Command] = []
        for announcement in announcements:
            if announcement.written is not None:
                record, raw = announcement.written
                index_key, record_key = _keys(record)
                commands.append(("EVAL", _WITHDRAW_SCRIPT, 2, record_key, index_key, raw, record.key))
        try:
            if commands:
                await self._store.run(commands)
        except StoreDown as exc:
            _log.info("records_left_to_expire", error=str(exc))

    async def beat(self) -> bytes:
        """One heartbeat: writes the announcements and refreshes the snapshot.

        Returns:
            The generation of Redis's data: another value than before means that the data was lost in between.

        Raises:
            StoreDown: Redis does not answer; the snapshot stays.
        """
        try:
            await self._write()
            generation, id_sets = await self._read_index()
            await self._refresh(generation, id_sets)
        except StoreDown:
            self._extend_grace()
            raise
        return generation

    async def _write(self) -> None:
        commands: list[Command] = []
        for announcement in self._announcements:
            record = announcement.current()
            announcement.written = (record, encode_record(record))
            index_key, record_key = _keys(record)
            commands.append(("SET", record_key, announcement.written[1], "PX", int(self._lifetime_s * 1000)))
            commands.append(("SADD", index_key, record.key))
        if commands:
            await self._store.run(commands)

    async def _read_index(self) -> tuple[bytes, list[Collection[bytes]]]:
        """Generation, made if missing, and the ids of each watched kind."""
        commands: list[Command] = [
            ("SET", _GENERATION_KEY, secrets.token_bytes(8), "NX"),
            ("GET", _GENERATION_KEY),
            *(("SMEMBERS", _PREFIX + _KINDS[cls]) for cls in self._watch),
        ]
        _, generation, *id_sets = await self._store.run(commands)
        return generation, id_sets

    async def _refresh(self, generation: bytes, id_sets: Collection[Collection[bytes]]) -> None:
        if self._generation is not None and generation != self._generation:
            _log.warning("directory_lost_its_data")
            self._extend_grace()
        self._generation = generation
        wanted = [(cls, sorted(ids)) for cls, ids in zip(self._watch, id_sets, strict=True)]
        values = iter(
            await self._store.get_many([_PREFIX + _KINDS[cls] + b":" + key for cls, ids in wanted for key in ids])
        )
        expired: list[Command] = []
        fresh: dict[RecordType, dict[str, Record]] = {}
        for cls, ids in wanted:
            found = {key: next(values) for key in ids}
            fresh[cls] = _decode_all(cls, found)
            gone = [key for key, raw in found.items() if raw is None]
            if gone:
                expired.append(("SREM", _PREFIX + _KINDS[cls], *gone))
        self._adopt(fresh)
        if expired:
            await self._store.run(expired)

    def _adopt(self, fresh: dict[RecordType, dict[str, Record]]) -> None:
        if self._clock() < self._grace_until:
            fresh = {cls: {**self._snapshot[cls], **records} for cls, records in fresh.items()}
        if fresh != self._snapshot:
            self._snapshot = fresh
            self._records = {cls: tuple(records.values()) for cls, records in fresh.items()}
            self._changed.set()
            self._changed = asyncio.Event()

    def _extend_grace(self) -> None:
        self._grace_until = self._clock() + self._lifetime_s


def _keys(record: Record) -> tuple[bytes, bytes]:
    index_key = _PREFIX + _KINDS[type(record)]
    return index_key, index_key + b":" + record.key.encode()


def _decode_all(cls: RecordType, raw_records: dict[bytes, bytes | None]) -> dict[str, Record]:
    records: dict[str, Record] = {}
    for key, raw in raw_records.items():
        if raw is None:
            continue
        try:
            records[key.decode()] = decode_record(cls, raw)
        except ValueError as exc:
            _log.warning("foreign_record_ignored", key=key, error=str(exc))
    return records
