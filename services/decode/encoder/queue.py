"""Inputs of all calls wait here and are computed in batches, on a thread beside the event loop."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt
import structlog

from shared.engine.block_pool import BlockCounts
from shared.engine.stats import EngineStats
from shared.errors import Overloaded, WorkerLost
from shared.models.encoder import Encoder

log = structlog.get_logger(__name__)

Vector = npt.NDArray[np.float64]

_NO_BLOCKS = BlockCounts(total=0, free=0, cached=0, used=0, pinned=0, quarantined=0)


class EncoderPooling(Enum):
    """Which of the final hidden states make up an input's vector."""

    CLS = "cls"
    MEAN = "mean"


@dataclass(order=True, slots=True)
class _Waiting:
    """An input; lower priority first, then the earlier one."""

    priority: int
    number: int
    token_ids: list[int] = field(compare=False)
    pooling: EncoderPooling = field(compare=False)
    vector: asyncio.Future[Vector] = field(compare=False)


class EncoderQueue:
    """One for the process, on its event loop.

    Args:
        max_batch_tokens: Of a batch; an input cannot be cut, so one that is longer is a batch of its own.
        max_sequences: Inputs of a batch.
        max_waiting: Inputs that may wait; a call that brings more is refused.
        on_thread_start: Run first on the thread that computes.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_waiting: int,
        on_thread_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._encoder = encoder
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self._max_waiting = max_waiting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode", initializer=on_thread_start)
        self._waiting: list[_Waiting] = []
        self._numbers = itertools.count()
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._running: list[_Waiting] = []
        self._failure = ""
        self._steps = self._num_tokens = 0
        self._last_step_s = 0.0
        self._last_progress_s = time.monotonic()

    async def encode(self, inputs: Sequence[list[int]], pooling: EncoderPooling, priority: int) -> list[Vector]:
        """Vectors of all inputs, in their order; cancelling it takes those that still wait out of the queue.

        Raises:
            Overloaded: Too many inputs wait.
            WorkerLost: The model failed.
        """
        self._check_room(len(inputs))
        loop = asyncio.get_running_loop()
        if not self._waiting and not self._running:
            self._last_progress_s = time.monotonic()
        items = [_Waiting(priority, next(self._numbers), ids, pooling, loop.create_future()) for ids in inputs]
        for item in items:
            heapq.heappush(self._waiting, item)
        self._arrived.set()
        self._idle.clear()
        try:
            return await asyncio.gather(*(item.vector for item in items))
        finally:
            if any(item.vector.cancelled() for item in items):
                self._waiting = [item for item in self._waiting if not item.vector.cancelled()]
                heapq.heapify(self._waiting)

    async def run(self) -> None:
        """Computes for as long as it is not cancelled.

        Raises:
            Exception: The model failed; everything that waited was told so, and nothing is taken any more.
        """
        loop = asyncio.get_running_loop()
        try:
            while True:
                while not self._waiting:
                    self._idle.set()
                    self._arrived.clear()
                    await self._arrived.wait()
                self._running = self._next_batch()
                started_s = time.monotonic()
                vectors = await loop.run_in_executor(self._thread, self._compute, self._running)
                self._finish(vectors, time.monotonic() - started_s)
        except asyncio.CancelledError:
            self._drop_all("it was stopped")
            raise
        except Exception as exc:
            log.exception("encoder_failed")
            self._failure = str(exc) or type(exc).__name__
            self._drop_all(self._failure)
            raise

    def close(self) -> None:
        """Ends the thread after its batch."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    @property
    def is_idle(self) -> bool:
        """Nothing waits or is computed."""
        return not self._waiting and not self._running

    async def until_idle(self) -> None:
        """Returns when nothing waits or is computed, or the model failed."""
        await self._idle.wait()

    def stats(self) -> EngineStats:
        """A snapshot; every KV field is 0."""
        running = len(self._running)
        return EngineStats(
            blocks=_NO_BLOCKS,
            oldest_pin_s=0.0,
            running=running,
            waiting=len(self._waiting),
            waiting_for_kv=0,
            queued_prefill_tokens=sum(len(item.token_ids) for item in self._waiting),
            steps=self._steps,
            last_step_s=self._last_step_s,
            last_progress_s=time.monotonic() if self.is_idle else self._last_progress_s,
            used_slots=0,
            allocated_slots=0,
            preemptions=0,
            prefix_query_tokens=0,
            prefix_hit_tokens=0,
            prefill_tokens_per_s=0.0,
            neighbour_slowdown=1.0,
            prefilled_tokens=self._num_tokens,
            generated_tokens=0,
            failure=self._failure,
        )

    def _check_room(self, num_inputs: int) -> None:
        if self._failure:
            raise WorkerLost(f"the encoder stopped: {self._failure}")
        if len(self._waiting) + num_inputs > self._max_waiting:
            raise Overloaded(
                f"{len(self._waiting)} inputs wait, {num_inputs} more would exceed the limit of {self._max_waiting}"
            )

    def _next_batch(self) -> list[_Waiting]:
        """The first that fit; the very first always does."""
        batch = [heapq.heappop(self._waiting)]
        room = self._max_batch_tokens - len(batch[0].token_ids)
        while self._waiting and len(batch) < self._max_sequences and len(self._waiting[0].token_ids) <= room:
            batch.append(heapq.heappop(self._waiting))
            room -= len(batch[-1].token_ids)
        return batch

    def _compute(self, batch: list[_Waiting]) -> list[Vector]:
        """On the thread."""
        vectors = []
        for item, states in zip(batch, self._encoder.forward([item.token_ids for item in batch]), strict=True):
            wide = states.double()
            vectors.append((wide[0] if item.pooling is EncoderPooling.CLS else wide.mean(0)).numpy())
        return vectors

    def _finish(self, vectors: list[Vector], seconds: float) -> None:
        for item, vector in zip(self._running, vectors, strict=True):
            if not item.vector.done():
                item.vector.set_result(vector)
        self._num_tokens += sum(len(item.token_ids) for item in self._running)
        self._steps += 1
        self._last_step_s, self._last_progress_s = seconds, time.monotonic()
        self._running = []

    def _drop_all(self, reason: str) -> None:
        for item in (*self._running, *self._waiting):
            if not item.vector.done():
                item.vector.set_exception(WorkerLost(f"the encoder stopped: {reason}"))
        self._running, self._waiting = [], []
        self._idle.set()
