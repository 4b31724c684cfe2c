"""The decode workers that this gateway is connected to: one open stream each, following the directory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from functools import partial

import structlog

from services.gateway.embeddings.call import EmbedCall
from services.gateway.sessions.placement import Holder, Snapshot, can_take_work
from services.gateway.sessions.placement_learning import PlacementLearning
from services.gateway.sessions.session import Choice, Session
from services.gateway.sessions.worker_stream import WorkerStream
from shared.directory.client import Directory
from shared.directory.records import WorkerRecord
from shared.errors import TandemError, Unavailable, WorkerLost
from shared.identity import Fingerprint, Incarnation, WorkerId
from shared.metrics.tally import Tally
from shared.rpc import TlsFiles

log = structlog.get_logger(__name__)

FOLLOW_EVERY_S = 0.25
CONNECT_TIMEOUT_S = 5.0
RECONNECT_AFTER_S = 0.25
MAX_RECONNECT_AFTER_S = 2.0
MAX_EMBED_ATTEMPTS = 2


class _Fleet:
    """Workers of the served model, as one look at the directory had them."""

    def __init__(self, records: tuple[WorkerRecord, ...], model: str) -> None:
        self.records = records
        self.decode = [record for record in records if record.role == "decode" and record.model == model]
        self.prefill = [record for record in records if record.role == "prefill" and record.model == model]
        self.context_len = min((r.max_model_len for r in self.decode if r.max_model_len > 0), default=None)
        sizes = (r.load.total_blocks * r.block_size for r in self.decode)
        self.cache_len = min((size + 1 for size in sizes if size), default=None)


class Workers:
    """Keeps a stream to every decode worker of the served model, and counts what was sent where.

    A worker whose stream is broken is no candidate for placement, long before its record expires. A worker whose record
    is gone keeps its stream while it has sessions: the directory is a hint.
    """

    def __init__(
        self, directory: Directory, gateway_id: str, model: str, token_gap_s: Tally, tls: TlsFiles | None = None
    ) -> None:
        self._directory = directory
        self._gateway_id = gateway_id
        self._model = model
        self._token_gap_s = token_gap_s
        self._tls = tls
        self._streams: dict[Incarnation, WorkerStream] = {}
        self._keepers: dict[Incarnation, asyncio.Task[None]] = {}
        self._learning = PlacementLearning()
        self._sent_prefill: dict[WorkerId, dict[Session, int]] = {}
        self._known = _Fleet((), model)
        self._follower: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to follow the directory; needs a running loop."""
        self._follower = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Ends every stream, and with it every session that is left."""
        tasks = [*self._keepers.values(), *([self._follower] if self._follower else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def decode_workers(
        self, excluding: frozenset[Incarnation] = frozenset(), fingerprint: Fingerprint | None = None
    ) -> list[WorkerRecord]:
        """Those that can be submitted to now; see `snapshot`."""
        return [
            worker
            for worker in self._fleet.decode
            if self.is_connected(worker.incarnation)
            and worker.incarnation not in excluding
            and fingerprint in (None, worker.fingerprint)
        ]

    def snapshot(
        self, excluding: frozenset[Incarnation] = frozenset(), fingerprint: Fingerprint | None = None
    ) -> Snapshot:
        """The cluster as placement sees it.

        Args:
            excluding: Workers that gave the session up already.
            fingerprint: If given, decode workers of this one only: whoever goes on with a session needs its weights.
        """
        workers = self.decode_workers(excluding, fingerprint)
        return Snapshot(
            decode_workers=workers,
            prefill_workers=self._fleet.prefill,
            transfers=self._directory.transfers(),
            open_sessions={worker.worker_id: self._streams[worker.incarnation].num_sessions for worker in workers},
            sent_prefill_tokens={worker_id: sum(sent.values()) for worker_id, sent in self._sent_prefill.items()},
            overhead_s=self._learning.overheads(),
        )

    def context_len(self, model_len: int) -> int:
        """Tokens that prompt and reply may have together: the least that a known decode worker admits."""
        known = self._fleet.context_len
        return model_len if known is None else known

    def cache_len(self, model_len: int) -> int:
        """Tokens whose KV the smallest cache holds, and one: the last token is sampled and needs none."""
        known = self._fleet.cache_len
        return model_len if known is None else known

    def is_connected(self, incarnation: Incarnation) -> bool:
        """That worker can be submitted to."""
        return incarnation in self._streams and self._streams[incarnation].is_open

    def submit(
        self,
        session: Session,
        *,
        holders: Mapping[int, Sequence[Holder]],
        cache_salt: str,
        priority: int,
        timeout_s: float,
    ) -> None:
        """Submits a session where its placement says, and counts its prompt until `prefilled`; see `WorkerStream`.

        Raises:
            WorkerLost: There is no open stream to that incarnation.
        """
        placement = session.placement
        assert placement is not None
        stream = self._streams.get(placement.decode.incarnation)
        if stream is None:
            raise WorkerLost(f"worker {placement.decode.worker_id} is gone")
        stream.submit(session, holders=holders, cache_salt=cache_salt, priority=priority, timeout_s=timeout_s)
        self._sent_prefill.setdefault(placement.computes.worker_id, {})[session] = placement.uncached_tokens

    async def embed(self, call: EmbedCall, timeout_s: float) -> bytes:
        """Vectors from the worker with the fewest sessions; another one is asked if that is lost.

        Raises:
            Unavailable: No decode worker is ready.
            TandemError: The worker refuses.
        """
        lost: frozenset[Incarnation] = frozenset()
        while True:
            snapshot = self.snapshot(lost)
            ready = [worker for worker in snapshot.decode_workers if can_take_work(worker)]
            if not ready:
                raise Unavailable("no decode worker is ready")
            worker = min(ready, key=lambda w: (snapshot.open_sessions.get(w.worker_id, 0), w.load.waiting))
            try:
                return await self._streams[worker.incarnation].embed(call, timeout_s)
            except Unavailable as exc:
                lost |= {worker.incarnation}
                if len(lost) == MAX_EMBED_ATTEMPTS:
                    raise
                log.info("embedding_moved", call_id=call.call_id, cause=exc.code)

    def first_token(self, session: Session) -> None:
        """A session's first token at its worker came: placement learns what it took."""
        assert session.placement is not None
        self._learning.observe(session.placement, session.first_token_s - session.submitted_s)
        self.prefilled(session)

    def prefilled(self, session: Session) -> None:
        """The session's first token came, or it ended: its prompt waits nowhere any more."""
        if session.placement is not None:
            self._sent_prefill.get(session.placement.computes.worker_id, {}).pop(session, None)

    def abort(self, session: Session, choices: Sequence[Choice] = ()) -> None:
        """Ends a session, or only some of its choices; does nothing when it has ended."""
        if session.placement is None:
            return
        stream = self._streams.get(session.placement.decode.incarnation)
        if stream is None:
            return
        if choices:
            stream.abort_choices(session, choices)
        else:
            stream.abort(session)

    @property
    def _fleet(self) -> _Fleet:
        """Looked through once per change: every request asks for it several times."""
        records = self._directory.workers()
        if records is not self._known.records:
            self._known = _Fleet(records, self._model)
        return self._known

    async def _follow(self) -> None:
        while True:
            for record in self._fleet.decode:
                if record.incarnation not in self._keepers:
                    keeper = asyncio.create_task(self._keep_open(record))
                    self._keepers[record.incarnation] = keeper
                    keeper.add_done_callback(partial(self._forget_keeper, record.incarnation))
                if record.hung:
                    self._leave_hung(record)
            self._sent_prefill = {worker_id: sent for worker_id, sent in self._sent_prefill.items() if sent}
            await asyncio.sleep(FOLLOW_EVERY_S)

    def _leave_hung(self, record: WorkerRecord) -> None:
        """Has sessions go on elsewhere if there is such a place; else they wait for the step, which may end yet."""
        stream = self._streams.get(record.incarnation)
        if stream is None or not stream.num_sessions:
            return
        others = self.snapshot(frozenset({record.incarnation}), record.fingerprint).decode_workers
        if any(can_take_work(worker) for worker in others):
            log.warning("worker_hung", worker_id=record.worker_id, sessions=stream.num_sessions)
            stream.give_up_all(WorkerLost(f"worker {record.worker_id} finishes no step"))

    def _forget_keeper(self, incarnation: Incarnation, keeper: asyncio.Task[None]) -> None:
        """The record is gone, or a defect ended the keeper; then the next look at the directory makes another."""
        self._keepers.pop(incarnation, None)
        if not keeper.cancelled() and (defect := keeper.exception()):
            log.error("worker_keeper_failed", incarnation=incarnation, exc_info=defect)

    async def _keep_open(self, record: WorkerRecord) -> None:
        """Reconnects to one incarnation for as long as the directory knows it."""
        pause_s = RECONNECT_AFTER_S
        while self._is_announced(record):
            opened_s = time.monotonic()
            try:
                stream = await WorkerStream.open(
                    record, self._gateway_id, CONNECT_TIMEOUT_S, self._token_gap_s, self._tls
                )
            except TandemError as exc:
                log.warning("worker_unreachable", worker_id=record.worker_id, code=exc.code, error=exc.message)
            else:
                log.info("worker_connected", worker_id=record.worker_id, incarnation=record.incarnation)
                await self._run(stream)
                log.warning("worker_disconnected", worker_id=record.worker_id, incarnation=record.incarnation)
            pause_s = RECONNECT_AFTER_S if time.monotonic() - opened_s > 5 else min(2 * pause_s, MAX_RECONNECT_AFTER_S)
            await asyncio.sleep(pause_s)

    async def _run(self, stream: WorkerStream) -> None:
        self._streams[stream.record.incarnation] = stream
        try:
            await stream.run()
        finally:
            self._streams.pop(stream.record.incarnation, None)

    def _is_announced(self, record: WorkerRecord) -> bool:
        return any(other.incarnation == record.incarnation for other in self._directory.workers())
