"""Where key records are kept: a file beside the gateway, or Redis for a fleet of gateways."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from shared.access.api_keys import KeyRecord
from shared.directory.store import RedisStore, StoreDown
from shared.errors import ConfigurationError

log = structlog.get_logger(__name__)

REDIS_KEY = "tandem:api-keys"
REDIS_TIMEOUT_S = 2.0
REFRESH_S = 2.0
"""How old what a gateway knows of the keys may be: a revoked key works so long."""


class KeyStore(Protocol):
    """Records by id."""

    async def records(self) -> dict[str, KeyRecord]:
        """All of them, revoked ones too."""

    async def put(self, record: KeyRecord) -> None:
        """Adds or replaces one."""


class FileKeys:
    """A JSON file that its owner alone can read; replaced as a whole, read again when it changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_at: tuple[int, int] | None = None
        self._records: dict[str, KeyRecord] = {}

    async def records(self) -> dict[str, KeyRecord]:
        """See `KeyStore`.

        Raises:
            ConfigurationError: The file is not what this class writes.
        """
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return {}
        if (version := (status.st_mtime_ns, status.st_ino)) != self._read_at:
            try:
                records = msgspec.json.decode(self._path.read_bytes(), type=list[KeyRecord])
            except (msgspec.MsgspecError, OSError) as exc:
                raise ConfigurationError(f"API keys in {self._path}: {exc}") from exc
            self._records, self._read_at = {record.key_id: record for record in records}, version
        return self._records

    async def put(self, record: KeyRecord) -> None:
        """See `KeyStore`."""
        records = {**await self.records(), record.key_id: record}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._path.parent, prefix=self._path.name, delete=False) as file:
            file.write(msgspec.json.format(msgspec.json.encode(list(records.values())), indent=2) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self._path)


class RedisKeys:
    """A hash in Redis."""

    def __init__(self, redis_url: str) -> None:
        """Connects on first use.

        Raises:
            ConfigurationError: The URL is malformed.
        """
        self._redis = RedisStore(redis_url, lookup_timeout_s=REDIS_TIMEOUT_S, background_timeout_s=REDIS_TIMEOUT_S)

    async def records(self) -> dict[str, KeyRecord]:
        """See `KeyStore`.

        Raises:
            ConfigurationError: Redis is not there, or holds something else under the key.
        """
        try:
            [raw] = await self._redis.run([("HGETALL", REDIS_KEY)])
            return {key.decode(): msgspec.json.decode(value, type=KeyRecord) for key, value in raw.items()}
        except (StoreDown, msgspec.MsgspecError) as exc:
            raise ConfigurationError(f"API keys in Redis: {exc}") from exc

    async def put(self, record: KeyRecord) -> None:
        """See `KeyStore`."""
        try:
            await self._redis.run([("HSET", REDIS_KEY, record.key_id, msgspec.json.encode(record))])
        except StoreDown as exc:
            raise ConfigurationError(f"API keys in Redis: {exc}") from exc

    async def close(self) -> None:
        """Closes the connections."""
        await self._redis.close()


def open_key_store(where: str, redis_url: str) -> KeyStore:
    """The store that a setting names: `redis`, or a file's path."""
    return RedisKeys(redis_url) if where == "redis" else FileKeys(Path(where))


class KnownKeys:
    """A store's records as of at most `REFRESH_S` ago, so that a request costs no lookup and an outage no request."""

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._records: dict[str, KeyRecord] = {}
        self._refreshed_s = float("-inf")
        self._lock = asyncio.Lock()

    async def find(self, key_id: str) -> KeyRecord | None:
        """The record of an id."""
        if time.monotonic() - self._refreshed_s > REFRESH_S:
            await self._refresh()
        return self._records.get(key_id)

    async def _refresh(self) -> None:
        async with self._lock:
            if time.monotonic() - self._refreshed_s <= REFRESH_S:
                return
            try:
                self._records = await self._store.records()
            except ConfigurationError as exc:
                log.warning("api_keys_not_refreshed", error=exc.message, known=len(self._records))
            self._refreshed_s = time.monotonic()
