"""Runs batches: takes up those that nobody works on, and goes on where a gateway that died left off.

    validating -> in_progress -> finalizing -> completed | expired | cancelled
         `-> failed: the input file cannot be run

A result is on disk before it counts: a request is made again only if its gateway died between its reply and its line.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial

import structlog
from structlog.contextvars import bound_contextvars

from services.gateway.access.caller import Caller, set_caller
from services.gateway.access.keyring import Keyring
from services.gateway.batches.files import FileStore
from services.gateway.batches.lines import (
    BatchLine,
    ResultFile,
    error_line,
    file_error,
    read_lines,
    success_line,
    unmade_line,
)
from services.gateway.batches.records import BatchRecord, BatchRecords
from services.gateway.settings import GatewaySettings
from shared.errors import InternalError, NotAuthenticated, NotFound, TandemError, Unavailable

log = structlog.get_logger(__name__)

Execute = Callable[[str, bytes], Awaitable[bytes]]

RETRY_AFTER_S = 0.5
MAX_RETRY_AFTER_S = 10.0


class BatchRunner:
    """One for the gateway. Batches share its bound on requests under way.

    Args:
        execute: Serves one body of an endpoint, as HTTP would.
    """

    def __init__(
        self,
        records: BatchRecords,
        files: FileStore,
        keyring: Keyring,
        settings: GatewaySettings,
        owner: str,
        execute: Execute,
    ) -> None:
        self._records = records
        self._files = files
        self._keyring = keyring
        self._settings = settings
        self._owner = owner
        self._execute = execute
        self._room = asyncio.Semaphore(settings.batch_concurrency)
        self._working: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Looks for work until cancelled; then leaves it to others."""
        try:
            while True:
                try:
                    await self._take_up()
                except Unavailable as exc:
                    log.debug("batches_out_of_reach", error=exc.message)
                await asyncio.sleep(self._settings.batch_poll_s)
        finally:
            for task in self._working.values():
                task.cancel()
            await asyncio.gather(*self._working.values(), return_exceptions=True)

    async def _take_up(self) -> None:
        for batch_id in await self._records.active():
            if batch_id in self._working:
                continue
            if await self._records.claim(batch_id, self._owner, self._settings.background_alive_s):
                task = asyncio.create_task(self._work(batch_id))
                self._working[batch_id] = task
                task.add_done_callback(partial(self._forget, batch_id))

    def _forget(self, batch_id: str, task: asyncio.Task[None]) -> None:
        self._working.pop(batch_id, None)

    async def _work(self, batch_id: str) -> None:
        keeper: asyncio.Task[None] | None = None
        try:
            record = await self._records.find(batch_id)
            if record is not None and record.is_open:
                work = asyncio.create_task(self._run_batch(record))
                keeper = asyncio.create_task(self._keep(record, work))
                try:
                    await work
                finally:
                    work.cancel()
            await self._records.retire(batch_id)
        except asyncio.CancelledError:
            await self._records.release(batch_id)  # at once, for whoever comes next
            raise
        except TandemError as exc:
            log.warning("batch_interrupted", batch_id=batch_id, error=exc.message)
        except Exception:
            log.exception("batch_failed", batch_id=batch_id)
        finally:
            if keeper is not None:
                keeper.cancel()

    async def _keep(self, record: BatchRecord, work: asyncio.Task[None]) -> None:
        """Keeps the claim, and the counts in Redis."""
        while not work.done():
            await asyncio.sleep(min(1.0, self._settings.background_alive_s / 4))
            try:
                if not await self._records.claim(record.batch_id, self._owner, self._settings.background_alive_s):
                    work.cancel()  # we were silent for too long, and somebody else went on
                elif not work.done() and record.is_open:
                    await self._records.put(record)
            except Unavailable as exc:
                log.warning("batch_not_renewed", batch_id=record.batch_id, error=exc.message)

    async def _run_batch(self, record: BatchRecord) -> None:
        try:
            set_caller(await self._caller_of(record))
            path = await asyncio.to_thread(self._files.path, record.content["input_file_id"], record.tenant)
            lines, errors = await asyncio.to_thread(
                read_lines,
                path,
                record.content["endpoint"],
                max_lines=self._settings.max_batch_requests,
                max_line_bytes=self._settings.max_body_bytes,
                unknown_fields=self._settings.unknown_fields,
            )
        except NotFound as exc:
            lines, errors = [], [file_error(exc.code, exc.message, param="input_file_id")]
        except NotAuthenticated as exc:
            lines, errors = [], [file_error(exc.code, exc.message)]
        if errors:
            record.content["errors"] = {"object": "list", "data": errors}
            record.enter("failed")
            await self._records.put(record)
            return
        directory = self._files.make_directory()
        results = ResultFile(directory / f"{record.batch_id}.results")
        failures = ResultFile(directory / f"{record.batch_id}.failures")
        try:
            await self._make_requests(record, lines, results, failures)
        finally:
            results.close()
            failures.close()
        await self._finish(record, results, failures)

    async def _caller_of(self, record: BatchRecord) -> Caller:
        """Whose requests these are, with the priority and the limits that the key has now."""
        key = None
        if not self._keyring.is_empty and record.key_id:
            key = await self._keyring.record_of(record.key_id)
        return Caller(record.tenant, key, added_priority=self._settings.batch_priority)

    async def _make_requests(
        self, record: BatchRecord, lines: list[BatchLine], results: ResultFile, failures: ResultFile
    ) -> None:
        content = record.content
        _count(record, len(lines), results, failures)
        if content["status"] == "validating":
            record.enter("in_progress")
            await self._records.put(record)
        left = [line for line in lines if line.custom_id not in results.done | failures.done]
        tasks = [asyncio.create_task(self._make(record, line, results, failures, len(lines))) for line in left]
        try:
            ended = await self._until_over(record, tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if ended == "expired":
            for line in left:
                if line.custom_id not in results.done | failures.done:
                    message = "the request was not made within the completion window"
                    failures.add(line.custom_id, unmade_line(line.custom_id, "batch_expired", message))
            _count(record, len(lines), results, failures)
        content["status"] = ended

    async def _until_over(self, record: BatchRecord, tasks: list[asyncio.Task[None]]) -> str:
        """Waits for the requests, the end of the window, or a wish to cancel; returns which status follows."""
        while True:
            if await self._records.is_cancel_asked(record.batch_id):
                record.enter("cancelling")
                return "cancelled"
            left_s = record.content["expires_at"] - time.time()
            if left_s <= 0:
                return "expired"
            if all(task.done() for task in tasks):
                return "completed"
            await asyncio.wait(tasks, timeout=min(left_s, self._settings.batch_poll_s))

    async def _make(
        self, record: BatchRecord, line: BatchLine, results: ResultFile, failures: ResultFile, total: int
    ) -> None:
        """One request, again and again while it is only a matter of room."""
        pause_s = RETRY_AFTER_S
        while True:
            try:
                async with self._room:
                    with bound_contextvars(batch_id=record.batch_id, custom_id=line.custom_id):
                        reply = await self._execute(record.content["endpoint"], line.body)
                results.add(line.custom_id, success_line(line.custom_id, reply))
                break
            except TandemError as exc:
                if not exc.retryable:
                    failures.add(line.custom_id, error_line(line.custom_id, exc))
                    break
            except Exception:
                log.exception("batch_request_failed", batch_id=record.batch_id)
                error = InternalError("internal error; the gateway's log has the details")
                failures.add(line.custom_id, error_line(line.custom_id, error))
                break
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_RETRY_AFTER_S)
        _count(record, total, results, failures)

    async def _finish(self, record: BatchRecord, results: ResultFile, failures: ResultFile) -> None:
        """Results become files; only then the batch has ended."""
        ended = record.content["status"]
        record.enter("finalizing")
        for field, part in (("output_file_id", results), ("error_file_id", failures)):
            if part.path.exists():
                name = f"{record.batch_id}_{field.removesuffix('_file_id')}.jsonl"
                expiry = record.content.get("output_expires_after")
                adopted = await asyncio.to_thread(
                    self._files.adopt,
                    part.path,
                    name,
                    "batch_output",
                    record.tenant,
                    ttl_s=expiry["seconds"] if expiry else None,
                )
                record.content[field] = adopted.id
        record.enter(ended)
        await self._records.put(record)
        log.info("batch_ended", batch_id=record.batch_id, status=ended, **record.content["request_counts"])


def _count(record: BatchRecord, total: int, results: ResultFile, failures: ResultFile) -> None:
    counts = {"total": total, "completed": len(results.done), "failed": len(failures.done)}
    record.content["request_counts"] = counts
