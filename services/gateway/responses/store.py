"""Stored responses: one record each in Redis, with the whole conversation up to it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import orjson
import structlog

from services.gateway.access.caller import current_caller
from services.gateway.object_store import ObjectStore
from services.gateway.responses.input_items import Item
from shared.errors import InvalidRequest, NotFound, TandemError

log = structlog.get_logger(__name__)

KIND = "response"
ALIVE = "response-alive"
CANCEL = "response-cancel"
EVENTS = "response-events"
DELETED = "response-deleted"
IN_WORK = ("queued", "in_progress")


@dataclass(frozen=True, slots=True)
class ResponseRecord:
    """What is kept of a response.

    Attributes:
        response: The response object.
        asked: Its own input items.
        context: The items of the turns before.
        tenant: Whose it is; nobody else finds it.
    """

    response: dict[str, Any]
    asked: list[Item]
    context: list[Item]
    tenant: str

    @property
    def conversation(self) -> list[Item]:
        """Everything up to and with its output."""
        return [*self.context, *self.asked, *self.response["output"]]


class ResponseStore:
    """Records, and who still works on which.

    A running background response is alive as long as its gateway renews it; when it stopped doing so, whoever reads the
    record sees it as failed.
    """

    def __init__(self, objects: ObjectStore, *, ttl_s: float, max_bytes: int, alive_s: float) -> None:
        self._objects = objects
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self.alive_s = alive_s

    def check_size(self, items: list[Item]) -> None:
        """Refuses a conversation that is too long to be kept.

        Raises:
            InvalidRequest: With both sizes.
        """
        size = len(orjson.dumps(items))
        if size > self._max_bytes:
            raise InvalidRequest(
                f"the conversation has {size} bytes, at most {self._max_bytes} are stored; send 'store': false",
                param="input",
            )

    async def get(self, response_id: str) -> ResponseRecord:
        """The record as it stands, if it is the caller's.

        Raises:
            NotFound: There is none, or no more.
            Unavailable: Redis does not answer.
        """
        found = await self._objects.get(KIND, response_id)
        if found is None or found["tenant"] != current_caller().tenant:
            raise _not_found(response_id)
        response = found["response"]
        if response["background"] and await self.is_deleted(response_id):  # by now, whoever made it wrote it again
            raise _not_found(response_id)
        if response["status"] in IN_WORK and not await self._objects.exists(ALIVE, response_id):
            again = await self._objects.get(KIND, response_id)  # it may have ended between the two looks
            response = again["response"] if again else response
            if response["status"] in IN_WORK:
                error = {"code": "server_error", "message": "the gateway that made it stopped before it was finished"}
                response = {**response, "status": "failed", "error": error}
        return ResponseRecord(response, found["asked"], found["context"], found["tenant"])

    async def put(self, record: ResponseRecord) -> None:
        """Keeps the record as it is now.

        Raises:
            Unavailable: Redis does not answer.
        """
        content = dataclasses.asdict(record)
        await self._objects.put(KIND, record.response["id"], content, ttl_s=self._ttl_s)

    async def try_put(self, record: ResponseRecord) -> bool:
        """Likewise, but a response that cannot be kept is still a response: False then."""
        try:
            await self.put(record)
        except TandemError as exc:
            log.warning("response_not_stored", response_id=record.response["id"], error=exc.message)
            return False
        return True

    async def delete(self, response_id: str) -> None:
        """Forgets it; whoever still works on it ends, and what that writes is forgotten too.

        Raises:
            NotFound: There is none, or no more.
            Unavailable: Redis does not answer.
        """
        record = await self.get(response_id)
        if record.response["background"]:
            await self._objects.claim(DELETED, response_id, "client", ttl_s=self._ttl_s)
            await self.ask_to_cancel(response_id)
        await self._forget(response_id)

    async def is_deleted(self, response_id: str) -> bool:
        """Whether somebody deleted a background response."""
        return await self._objects.exists(DELETED, response_id)

    async def _forget(self, response_id: str) -> None:
        await self._objects.delete(KIND, response_id)
        await self._objects.delete(EVENTS, response_id)

    async def renew(self, response_id: str) -> None:
        """Says that somebody works on it."""
        await self._objects.claim(ALIVE, response_id, "gateway", ttl_s=self.alive_s)

    async def released(self, response_id: str) -> None:
        """Says that nobody does any more; the last that whoever worked on it writes."""
        if await self.is_deleted(response_id):
            await self._forget(response_id)
        await self._objects.delete(ALIVE, response_id)
        await self._objects.delete(CANCEL, response_id)

    async def ask_to_cancel(self, response_id: str) -> None:
        """Tells the gateway that works on it, whichever that is."""
        await self._objects.claim(CANCEL, response_id, "client", ttl_s=self._ttl_s)

    async def is_cancel_asked(self, response_id: str) -> bool:
        """Whether somebody did."""
        return await self._objects.exists(CANCEL, response_id)

    async def put_events(self, response_id: str, events: list[bytes]) -> None:
        """Keeps the events of a background response that was streamed, for readers who come later."""
        content = {"events": [event.decode() for event in events]}
        await self._objects.put(EVENTS, response_id, content, ttl_s=self._ttl_s)

    async def events(self, response_id: str) -> list[bytes]:
        """They; none if it was not streamed."""
        found = await self._objects.get(EVENTS, response_id)
        return [event.encode() for event in found["events"]] if found else []


def _not_found(response_id: str) -> NotFound:
    return NotFound(f"there is no response {response_id[:64]!r}, or no more", param="response_id")
