"""Responses being made. In the foreground a run ends with its client; in the background it goes on without one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import structlog

from services.gateway.access.caller import current_caller
from services.gateway.responses.input_items import Item
from services.gateway.responses.reply import ResponseBuilder
from services.gateway.responses.store import ResponseRecord, ResponseStore
from services.gateway.sessions.generation import Generation
from shared.errors import InternalError, Overloaded, TandemError

log = structlog.get_logger(__name__)

Start = Callable[[], Awaitable[Generation]]


class ResponseRun:
    """One response from start to end. Its task is its own; readers come and go.

    Attributes:
        builder: What there is of it.
        error: Why it failed, if it did.
        tenant: Whose it is.
        is_deleted: Nobody finds it any more.
    """

    def __init__(
        self, builder: ResponseBuilder, asked: list[Item], context: list[Item], store: ResponseStore, start: Start
    ) -> None:
        self.builder = builder
        self.error: TandemError | None = None
        self.tenant = current_caller().tenant
        self.is_deleted = False
        self._asked = asked
        self._context = context
        self._store = store
        self._start = start
        self._news = asyncio.Condition()
        self._is_over = False
        self._task: asyncio.Task[None] | None = None

    @property
    def record(self) -> ResponseRecord:
        """As it is to be stored now."""
        return ResponseRecord(self.builder.as_json(), self._asked, self._context, self.tenant)

    def launch(self) -> asyncio.Task[None]:
        """Starts the work."""
        self._task = asyncio.create_task(self._work())
        return self._task

    def cancel(self) -> None:
        """Ends the work; what there is stays."""
        if self._task is not None:
            self._task.cancel()

    def delete(self) -> None:
        """Ends the work; nobody will ask what there is."""
        self.is_deleted = True
        self.cancel()

    def stop(self, reason: str) -> None:
        """Likewise, but that is no wish of its client: it has failed then, for a reason."""
        self.builder.stop(reason)
        self.cancel()

    async def finished(self) -> None:
        """Waits for the end."""
        async with self._news:
            await self._news.wait_for(lambda: self._is_over)

    async def read(self, position: int = 0) -> AsyncGenerator[list[bytes], None]:
        """Events from a position on, all that there are at a time, until the last."""
        events = self.builder.events
        while True:
            async with self._news:
                while len(events) <= position and not self._is_over:
                    await self._news.wait()
            if position < len(events):
                batch, position = events[position:], len(events)
                yield batch
            elif self._is_over:
                return

    async def _work(self) -> None:
        builder = self.builder
        try:
            await self._generate()
        except TandemError as exc:
            self.error = exc
            builder.fail(exc)
        except asyncio.CancelledError:
            builder.cancel()
        except Exception:
            log.exception("response_failed", response_id=builder.response_id)
            self.error = InternalError("internal error; the gateway's log has the details")
            builder.fail(self.error)
        if builder.is_stored:
            builder.is_stored = await self._store.try_put(self.record)
        builder.last_event()
        self._is_over = True
        await self._tell()

    async def _generate(self) -> None:
        generation = await self._start()
        builder = self.builder
        try:
            if builder.is_background:
                builder.begin()
            async for deltas in generation.batches():
                if builder.status == "queued":  # in the foreground nothing is told before the first delta
                    builder.begin()
                builder.add(deltas)
                await self._tell()
            builder.end(generation.usage)
        finally:
            generation.close()

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()


class BackgroundRuns:
    """The background responses that this gateway works on; owned by the gateway, closed with it."""

    def __init__(self, store: ResponseStore, max_runs: int) -> None:
        self._store = store
        self._max_runs = max_runs
        self._runs: dict[str, ResponseRun] = {}
        self._keepers: set[asyncio.Task[None]] = set()

    def get(self, response_id: str) -> ResponseRun | None:
        """The run, if it is here, not over, and the caller's."""
        run = self._runs.get(response_id)
        return run if run is not None and run.tenant == current_caller().tenant and not run.is_deleted else None

    async def launch(self, run: ResponseRun) -> None:
        """Stores the response as queued, and begins.

        Raises:
            Overloaded: Too many are under way here.
            Unavailable: Redis does not answer.
        """
        if len(self._runs) >= self._max_runs:
            raise Overloaded(f"{len(self._runs)} background responses are under way, at most {self._max_runs} may be")
        response_id = run.builder.response_id
        self._runs[response_id] = run
        try:
            run.builder.queued()
            await self._store.renew(response_id)
            await self._store.put(run.record)
        except BaseException:
            del self._runs[response_id]
            raise
        keeper = asyncio.create_task(self._keep(run))
        self._keepers.add(keeper)
        keeper.add_done_callback(self._keepers.discard)

    async def close(self) -> None:
        """Ends what still runs, and says so in its record."""
        for run in self._runs.values():
            run.stop("the gateway stopped before it was finished")
        await asyncio.gather(*self._keepers, return_exceptions=True)

    async def _keep(self, run: ResponseRun) -> None:
        """Renews the response's life in Redis while it runs, and looks whether somebody asked to cancel it."""
        response_id, work = run.builder.response_id, run.launch()
        stored_status = "queued"
        try:
            while not work.done():
                await asyncio.wait((work,), timeout=self._store.alive_s / 4)
                try:
                    if not work.done() and run.builder.status != stored_status:
                        stored_status = run.builder.status
                        await self._store.put(run.record)
                    await self._store.renew(response_id)
                    if await self._store.is_cancel_asked(response_id):
                        run.is_deleted = await self._store.is_deleted(response_id)
                        run.cancel()
                except TandemError as exc:
                    log.warning("response_not_renewed", response_id=response_id, error=exc.message)
            if run.builder.events:
                await self._store.put_events(response_id, run.builder.events)
            await self._store.released(response_id)
        except TandemError as exc:
            log.warning("response_not_released", response_id=response_id, error=exc.message)
        finally:
            self._runs.pop(response_id, None)
