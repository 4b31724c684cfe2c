"""How a worker leaves: it takes nothing new, owes nobody anything, and then it is gone.

    SIGTERM -> draining record -> sequences end, at most drain_timeout_s -> the rest is handed back
            -> owed fetches end -> unsaved blocks go to the host tier -> out of the directory -> calls end -> exit 0

What is handed back goes on at another worker, which fetches from here what this one computed.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import structlog

from protos import worker_pb2_grpc as rpc
from shared.directory.client import Directory
from shared.engine.engine import Engine
from shared.worker.save_ahead import save_all
from shared.worker.sidecar_link import SidecarLink
from shared.worker.status import WorkerStatus

log = structlog.get_logger(__name__)

_POLL_S = 0.02
_QUIET_S = 0.5  # nobody fetched for so long: whoever was handed a session has what it wanted
_OWED_FETCHES_S = 5.0
_SAVE_S = 5.0


class RoleServicer(rpc.WorkerServicer, ABC):
    """The servicer of a role, as a drain needs it."""

    @abstractmethod
    def hand_back(self) -> int:
        """Gives up whatever still runs, in a way that its caller goes on elsewhere; returns how much there was."""

    @abstractmethod
    def end_calls(self) -> None:
        """Ends the calls that stay open without work, as soon as everything was sent."""


class Drain:
    """One drain; made when the process is told to stop."""

    def __init__(
        self, engine: Engine, link: SidecarLink, status: WorkerStatus, directory: Directory, servicer: RoleServicer
    ) -> None:
        self._engine = engine
        self._link = link
        self._status = status
        self._directory = directory
        self._servicer = servicer

    async def run(self, timeout_s: float) -> None:
        """Returns when nothing is owed any more.

        Args:
            timeout_s: How long sequences may go on before they are handed back.
        """
        deadline_s = time.monotonic() + timeout_s
        self._status.is_draining = True
        await self._directory.heartbeat_now()
        log.info("draining", timeout_s=timeout_s)
        if not await _until(lambda: not self._has_sequences(), timeout_s):
            log.info("handing_back", sessions=self._servicer.hand_back())
            await self._until_quiet()
        owed_s = max(_OWED_FETCHES_S, deadline_s - time.monotonic())
        await _until(lambda: not self._engine.stats().blocks.pinned, owed_s)
        await self._save()
        await self._directory.withdraw()
        self._servicer.end_calls()

    def _has_sequences(self) -> bool:
        stats = self._engine.stats()
        return bool(stats.running or stats.waiting or stats.waiting_for_kv) and not stats.failure

    async def _until_quiet(self) -> None:
        """The workers that got the sessions come to fetch: waits until none has blocks pinned for a while."""
        busy_s = time.monotonic()

        def is_quiet() -> bool:
            nonlocal busy_s
            if self._engine.stats().blocks.pinned or self._has_sequences():
                busy_s = time.monotonic()
            return time.monotonic() - busy_s > _QUIET_S

        await _until(is_quiet, _OWED_FETCHES_S)

    async def _save(self) -> None:
        try:
            async with asyncio.timeout(_SAVE_S):
                log.info("blocks_saved", blocks=await save_all(self._engine, self._link))
        except TimeoutError:
            log.warning("save_cut_off", limit_s=_SAVE_S)


async def _until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline_s:
            return False
        await asyncio.sleep(_POLL_S)
    return True
