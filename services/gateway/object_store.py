"""JSON objects in Redis that outlive a request: stored responses, batches. Every one has a time to live."""

from __future__ import annotations

from typing import Any, cast

import orjson

from shared.directory.store import RedisStore, StoreDown
from shared.errors import Unavailable

TIMEOUT_S = 2.0


class ObjectStore:
    """Owned by the gateway, closed with it. Connects when first used, so a gateway starts without Redis.

    Every method raises `Unavailable` when Redis does not answer.
    """

    def __init__(self, url: str) -> None:
        self._redis = RedisStore(url, lookup_timeout_s=TIMEOUT_S, background_timeout_s=TIMEOUT_S)

    async def close(self) -> None:
        """Closes the connections."""
        await self._redis.close()

    async def get(self, kind: str, object_id: str) -> dict[str, Any] | None:
        """The object; None when there is none, or no more."""
        raw = await self._run("GET", _key(kind, object_id))
        return cast("dict[str, Any]", orjson.loads(raw)) if raw else None

    async def put(self, kind: str, object_id: str, content: dict[str, Any], *, ttl_s: float) -> None:
        """Keeps the object from now for `ttl_s`."""
        await self._run("SET", _key(kind, object_id), orjson.dumps(content), "PX", _ms(ttl_s))

    async def claim(self, kind: str, object_id: str, owner: str, *, ttl_s: float) -> bool:
        """Takes or keeps a name that only one process may have; False while another one has it."""
        key = _key(kind, object_id)
        if await self._run("SET", key, owner, "PX", _ms(ttl_s), "NX"):
            return True
        if await self._run("GET", key) != owner.encode():
            return False
        return bool(await self._run("PEXPIRE", key, _ms(ttl_s)))

    async def exists(self, kind: str, object_id: str) -> bool:
        """Whether there is such an object or claim."""
        return bool(await self._run("EXISTS", _key(kind, object_id)))

    async def delete(self, kind: str, object_id: str) -> bool:
        """Whether there was one."""
        return bool(await self._run("DEL", _key(kind, object_id)))

    async def add_to_index(self, kind: str, object_id: str, rank: float) -> None:
        """Lists an object under its kind, ordered by rank."""
        await self._run("ZADD", _key(kind, "index"), str(rank), object_id)

    async def remove_from_index(self, kind: str, object_id: str) -> None:
        """Lists it no more."""
        await self._run("ZREM", _key(kind, "index"), object_id)

    async def index(self, kind: str) -> list[str]:
        """Ids of a kind, highest rank first; some may have expired."""
        return [member.decode() for member in await self._run("ZREVRANGE", _key(kind, "index"), 0, -1)]

    async def _run(self, *command: str | bytes | int) -> Any:
        try:
            [answer] = await self._redis.run([command])
        except StoreDown as exc:
            raise Unavailable(f"stored objects are out of reach: Redis does not answer ({exc})"[:300]) from exc
        return answer


def _key(kind: str, object_id: str) -> str:
    return f"tandem:{kind}:{object_id}"


def _ms(seconds: float) -> int:
    return max(1, int(seconds * 1000))
