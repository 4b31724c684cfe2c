"""What a prefill worker does when a step of it does not end: its callers get their prompts back and compute them.

A decode worker's sessions can only go on elsewhere; whether there is such a place, the gateway knows.
"""

from __future__ import annotations

import asyncio

import structlog

from shared.worker.drain import RoleServicer
from shared.worker.status import WorkerStatus

log = structlog.get_logger(__name__)

_LOOK_EVERY_S = 1.0


async def hand_back_when_hung(status: WorkerStatus, servicer: RoleServicer) -> None:
    """Looks again and again, until cancelled."""
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        if status.is_hung:
            log.warning("worker_hung", handed_back=servicer.hand_back())
