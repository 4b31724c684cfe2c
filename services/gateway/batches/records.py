"""Batches in Redis: the batch object, whose it is, and who works on it."""

from __future__ import annotations

import math
import secrets
import time
from dataclasses import dataclass
from typing import Any

from services.gateway.access.caller import Caller
from services.gateway.batches.schemas import ENDPOINTS, BatchBody
from services.gateway.object_store import ObjectStore
from services.gateway.requests.metadata import check_metadata
from shared.errors import InvalidRequest, NotFound, UnsupportedField

KIND = "batch"
OWNER = "batch-owner"
CANCEL = "batch-cancel"
ACTIVE = "batches-active"
OPEN_STATUSES = ("validating", "in_progress", "finalizing", "cancelling")

WINDOWS = {"24h": 86_400.0}
"""What `completion_window` may be, in seconds: OpenAI's API documents one."""


@dataclass(slots=True)
class BatchRecord:
    """One batch; `content` is the batch object.

    Attributes:
        tenant: Whose it is; nobody else finds it.
        key_id: Of the API key that made it, whose priority and limits its requests have; "" = made without one.
    """

    content: dict[str, Any]
    tenant: str
    key_id: str = ""

    @property
    def batch_id(self) -> str:
        """Its id."""
        return str(self.content["id"])

    @property
    def is_open(self) -> bool:
        """It has not ended."""
        return self.content["status"] in OPEN_STATUSES

    def enter(self, status: str) -> None:
        """Changes the status, and notes when."""
        self.content["status"] = status
        if f"{status}_at" in self.content:
            self.content[f"{status}_at"] = int(time.time())


class BatchRecords:
    """All batches of the fleet."""

    def __init__(self, objects: ObjectStore, ttl_s: float) -> None:
        self._objects = objects
        self._ttl_s = ttl_s

    async def create(self, body: BatchBody, caller: Caller) -> BatchRecord:
        """Keeps a new batch; some gateway takes it up.

        Raises:
            Unavailable: Redis does not answer.
        """
        record = BatchRecord(_new_object(body), caller.tenant, caller.key.key_id if caller.key else "")
        await self.put(record)
        await self._objects.add_to_index(_kind_of(caller.tenant), record.batch_id, time.time())
        await self._objects.add_to_index(ACTIVE, record.batch_id, time.time())
        return record

    async def put(self, record: BatchRecord) -> None:
        """Keeps the record as it is now."""
        content = {"batch": record.content, "tenant": record.tenant, "key_id": record.key_id}
        await self._objects.put(KIND, record.batch_id, content, ttl_s=self._ttl_s)

    async def get(self, batch_id: str, tenant: str) -> BatchRecord:
        """The tenant's batch.

        Raises:
            NotFound: There is none, or no more.
        """
        record = await self.find(batch_id)
        if record is None or record.tenant != tenant:
            raise NotFound(f"there is no batch {batch_id[:64]!r}, or no more", param="batch_id")
        return record

    async def find(self, batch_id: str) -> BatchRecord | None:
        """The batch, whosever it is."""
        found = await self._objects.get(KIND, batch_id)
        if found is None:
            return None
        record = BatchRecord(found["batch"], found["tenant"], found.get("key_id", ""))
        if record.content["status"] in ("validating", "in_progress") and await self.is_cancel_asked(batch_id):
            record.content["status"] = "cancelling"
        return record

    async def all_of(self, tenant: str) -> list[BatchRecord]:
        """Newest first."""
        found = [await self.find(batch_id) for batch_id in await self._objects.index(_kind_of(tenant))]
        return [record for record in found if record is not None]

    async def active(self) -> list[str]:
        """Ids of those that have not ended, oldest first."""
        return (await self._objects.index(ACTIVE))[::-1]

    async def retire(self, batch_id: str) -> None:
        """It has ended, or is no more."""
        await self._objects.remove_from_index(ACTIVE, batch_id)
        await self._objects.delete(OWNER, batch_id)

    async def claim(self, batch_id: str, owner: str, ttl_s: float) -> bool:
        """Takes or keeps the work on it; False while somebody else has it."""
        return await self._objects.claim(OWNER, batch_id, owner, ttl_s=ttl_s)

    async def release(self, batch_id: str) -> None:
        """Leaves the work to whoever comes next."""
        await self._objects.delete(OWNER, batch_id)

    async def ask_to_cancel(self, batch_id: str) -> None:
        """Tells whoever works on it."""
        await self._objects.claim(CANCEL, batch_id, "client", ttl_s=self._ttl_s)

    async def is_cancel_asked(self, batch_id: str) -> bool:
        """Whether somebody did."""
        return await self._objects.exists(CANCEL, batch_id)


def check_batch(body: BatchBody) -> float:
    """Refuses what cannot be run; returns the window in seconds.

    Raises:
        InvalidRequest: The endpoint or the window is not one that is served, or the metadata are too long.
    """
    if body.endpoint not in ENDPOINTS:
        raise UnsupportedField(
            f"'endpoint' is {body.endpoint[:64]!r}, batches run {', '.join(ENDPOINTS)}", param="endpoint"
        )
    check_metadata(body.metadata)
    if body.completion_window not in WINDOWS:
        raise InvalidRequest(
            f"'completion_window' is {body.completion_window[:32]!r}; batches are given {' or '.join(WINDOWS)}, "
            "and are done sooner where there is room",
            param="completion_window",
        )
    return WINDOWS[body.completion_window]


def _new_object(body: BatchBody) -> dict[str, Any]:
    now = int(time.time())
    times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    return {
        "id": f"batch_{secrets.token_hex(16)}",
        "object": "batch",
        "endpoint": body.endpoint,
        "errors": None,
        "input_file_id": body.input_file_id,
        "completion_window": body.completion_window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "expires_at": math.ceil(time.time() + check_batch(body)),
        **{f"{status}_at": None for status in times},
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": body.metadata,
        "output_expires_after": body.output_expires_after.model_dump() if body.output_expires_after else None,
    }


def _kind_of(tenant: str) -> str:
    return f"batches-of:{tenant}"
