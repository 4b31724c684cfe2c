"""The engine as a service sees it: a thread that steps, and methods that any thread may call.

    event loop thread                         |  step thread
    submit, abort, release                    |  schedule()            lock held
    attach_cached, reserve, commit, pin, ...  |  launch(), result()    no lock: the forward pass
        all short, lock held                  |  update(), on_step()   lock held, then not

While a forward pass runs the others may take, seal and free blocks, but never those of a sequence in the step. A runner
that takes two steps gets the second while it computes the first: see `pipeline`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import structlog

from shared.engine.acquisition import KvAcquisition
from shared.engine.admission import check_admissible
from shared.engine.block_pool import BlockPool
from shared.engine.config import EngineConfig
from shared.engine.pipeline import LaunchedStep, OneStepAtATime, PipelinedRunner, Runner
from shared.engine.scheduler import Scheduler
from shared.engine.sequence import Sequence
from shared.engine.stats import EngineStats, StepMeter
from shared.engine.step import StepBatch, StepFigures, StepOutputs
from shared.errors import ConfigurationError, InternalError, Overloaded, Unavailable
from shared.identity import BlockHash, BlockId, SequenceId

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step that the runner has."""

    batch: StepBatch
    step: LaunchedStep
    started_s: float


class Engine:
    """Owns the step thread and the lock around pool and scheduler.

    Every submitted sequence appears in exactly one `StepOutputs.finished`, whatever happens.

    Args:
        runner: Computes the steps; only the step thread calls it.
        pool: Blocks of the runner's KV cache; the engine's own from now on.
        config: Limits and policies.
        on_step: Takes the outputs, called from the step thread without the lock: once after each step, and between
            steps as soon as there is something that no step would bring promptly. Must not block.
        on_start: Called in the step thread before its first step.
    """

    def __init__(
        self,
        runner: Runner | PipelinedRunner,
        pool: BlockPool,
        config: EngineConfig,
        on_step: Callable[[StepOutputs], None],
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        if config.block_size != pool.block_size:
            raise ConfigurationError(f"block_size is {config.block_size}, the pool's is {pool.block_size}")
        self._runner = runner if isinstance(runner, PipelinedRunner) else OneStepAtATime(runner)
        self._pool = pool
        self._config = config
        self._on_step = on_step
        self._on_start = on_start
        self._scheduler = Scheduler(pool, config)
        self._acquisition = KvAcquisition(pool, self._scheduler)
        self._meter = StepMeter(pool.block_size)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._is_woken = False
        self._is_stopping = False
        self._failure = ""
        self._last_progress_s = time.monotonic()
        self._in_flight: deque[_Launched] = deque()
        self._step_ended_s = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # Life

    def start(self) -> None:
        """Starts the step thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the step thread after the step in flight; what is unfinished ends as ABORTED. Blocks; idempotent."""
        with self._changed:
            was_stopping, self._is_stopping = self._is_stopping, True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()
        elif not was_stopping:
            self._abort_all()

    # Sequences

    def submit(self, sequences: Seq[Sequence]) -> None:
        """Takes in sequences, all or none, as WAITING or WAITING_FOR_KV.

        Raises:
            InvalidRequest, ContextLengthExceeded, CapacityExceeded: One could never run; with both numbers.
            Overloaded: The queue is full.
            Unavailable: The engine stopped.
        """
        for sequence in sequences:
            self._prepare(sequence)
        with self._changed:
            self._check_open(len(sequences))
            self._note_progress_if_idle()
            for sequence in sequences:
                self._scheduler.add(sequence)
            self._wake()

    def branch(self, kept: Seq[Sequence], branches: Seq[tuple[Sequence, Sequence]]) -> None:
        """Takes in WAITING sequences that begin with the tokens of others, which ended with `keeps_blocks`.

        They were admitted as one, so that a full queue is no reason to refuse them.

        Args:
            kept: All that give up their blocks now.
            branches: `(one of them, a new sequence)`.

        Raises:
            InvalidRequest, ContextLengthExceeded, CapacityExceeded: As `submit`.
            Unavailable: The engine stopped.
        """
        for _, sequence in branches:
            self._prepare(sequence)
        with self._changed:
            self._check_open(num_new=0)
            for origin, sequence in branches:
                self._scheduler.add(sequence, branches_off=origin)
            for origin in kept:
                self._scheduler.tables.release(origin)
            self._wake()

    def abort(self, sequence_ids: Iterable[SequenceId]) -> None:
        """Ends sequences as ABORTED, now or after the step in flight; those already finished are ignored.

        A step that has no others may end early.
        """
        with self._changed:
            self._scheduler.abort(sequence_ids)
            self._wake()

    def release(self, sequence: Sequence) -> None:
        """Gives up what one that finished as SEALED or with `keeps_blocks` still holds; does nothing otherwise."""
        with self._changed:
            if sequence.is_finished:
                self._scheduler.tables.release(sequence)
                self._wake()

    # KV acquisition, for sequences in WAITING_FOR_KV; see `acquisition`

    def attach_cached(self, sequence: Sequence) -> int:
        """Extends the sequence by blocks cached here; returns how many it holds now."""
        with self._changed:
            return self._acquisition.attach_cached(sequence)

    def reserve(self, sequence: Sequence, n: int) -> list[BlockId]:
        """Exactly `n` destination slots for a fetch; [] if there is no room now, or the sequence ended."""
        with self._changed:
            return self._acquisition.reserve(sequence, n)

    def commit(self, sequence: Sequence, block_ids: Seq[BlockId], hashes: Seq[BlockHash]) -> None:
        """Seals reserved slots, whose bytes were verified, and extends the sequence by those that continue it."""
        with self._changed:
            self._acquisition.commit(sequence, block_ids, hashes)
            self._wake()

    def discard(self, block_ids: Seq[BlockId]) -> None:
        """Frees reserved slots that no transport writes any more."""
        with self._changed:
            self._acquisition.discard(block_ids)
            self._wake()

    def quarantine(self, block_ids: Seq[BlockId]) -> None:
        """Sets reserved slots aside that a transport may still write."""
        with self._changed:
            self._acquisition.quarantine(block_ids)

    def release_quarantined(self, block_ids: Seq[BlockId]) -> None:
        """The transfers into quarantined slots are proven over."""
        with self._changed:
            self._acquisition.release_quarantined(block_ids)
            self._wake()

    def ready_for_schedule(self, sequence: Sequence) -> None:
        """WAITING_FOR_KV -> WAITING, with whatever KV it has; does nothing if it ended meanwhile."""
        with self._changed:
            self._note_progress_if_idle()
            self._scheduler.make_ready(sequence)
            self._wake()

    # Sealed blocks, for peers and the host tier

    def pin(self, hashes: Seq[BlockHash]) -> list[BlockId]:
        """Keeps the named blocks until `unpin`; -1 where there is none."""
        with self._changed:
            return [self._pool.pin(name) for name in hashes]

    def unpin(self, block_ids: Iterable[BlockId]) -> None:
        """Undoes a `pin`; ids of -1 are skipped."""
        with self._changed:
            for block in block_ids:
                if block >= 0:
                    self._pool.unpin(block)
            self._wake()

    def take_unsaved(self, limit: int, *, everything: bool = False) -> list[tuple[BlockHash, BlockId]]:
        """Pins the next blocks to copy to the host tier before they are evicted; see `BlockPool.take_unsaved`."""
        with self._changed:
            return self._pool.take_unsaved(limit, everything=everything)

    def saved(self, blocks: Seq[tuple[BlockHash, BlockId]], ok: Seq[bool]) -> None:
        """Ends the copies of blocks from `take_unsaved`; `ok` says which succeeded."""
        with self._changed:
            for (_, block), is_saved in zip(blocks, ok, strict=True):
                self._pool.saved(block, ok=is_saved)
            self._wake()

    def sealed_hashes(self) -> list[BlockHash]:
        """Every sealed block here, for publishing all anew; later outputs continue from it, possibly repeating some."""
        with self._changed:
            return self._pool.sealed_names()

    # Self-description

    def stats(self) -> EngineStats:
        """A consistent snapshot."""
        with self._changed:
            self._note_progress_if_idle()
            scheduler, meter = self._scheduler, self._meter
            return EngineStats(
                blocks=self._pool.counts(),
                oldest_pin_s=self._pool.oldest_pin_s,
                running=len(scheduler.running),
                waiting=scheduler.num_waiting,
                waiting_for_kv=scheduler.num_acquiring,
                queued_prefill_tokens=scheduler.queued_prefill_tokens(),
                steps=meter.steps,
                last_step_s=meter.last_step_s,
                last_progress_s=self._last_progress_s,
                used_slots=meter.used_slots,
                allocated_slots=meter.allocated_slots,
                preemptions=scheduler.preemption.count,
                prefix_query_tokens=scheduler.prefix_query_tokens,
                prefix_hit_tokens=scheduler.prefix_hit_tokens,
                prefill_tokens_per_s=meter.prefill_tokens_per_s,
                neighbour_slowdown=meter.neighbour_slowdown,
                prefilled_tokens=meter.prefilled_tokens,
                generated_tokens=meter.generated_tokens,
                failure=self._failure,
            )

    def check_integrity(self) -> None:
        """Verifies pool, index, tables and queues against each other.

        Raises:
            InternalError: They disagree.
        """
        with self._changed:
            self._scheduler.check_integrity(self._acquisition.reserved)

    # The step thread

    def _run(self) -> None:
        try:
            self._on_start()
            while self._step():
                pass
        except Exception as exc:
            _log.exception("engine_failed")
            with self._changed:
                self._failure = f"{type(exc).__name__}: {exc}"
        finally:
            self._abort_all()

    def _step(self) -> bool:
        with self._changed:
            while not (self._is_woken or self._is_stopping or self._in_flight):
                self._changed.wait()
            if self._is_stopping and not self._in_flight:
                return False
            batch = self._schedule()
            self._is_woken = bool(batch.scheduled)
            # What a step would delay, or what no step will bring.
            is_due = not batch.scheduled or self._scheduler.has_urgent_outputs
            outputs = self._scheduler.take_outputs() if is_due else None
        if outputs is not None:
            self._deliver(outputs)
        if batch.scheduled:
            started_s = time.monotonic()  # before the launch: a runner on the CPU computes the step in it
            self._in_flight.append(_Launched(batch, self._runner.launch(batch), started_s))
        if self._in_flight and (not batch.scheduled or len(self._in_flight) == self._runner.max_in_flight):
            self._deliver(self._take_back(self._in_flight.popleft()))
        return True

    def _schedule(self) -> StepBatch:
        if self._is_stopping:
            return StepBatch([])
        if self._in_flight:
            self._scheduler.assume(self._in_flight[-1].batch)
        return self._scheduler.schedule()

    def _take_back(self, launched: _Launched) -> StepOutputs:
        """Waits for a step and takes in what it computed."""
        result = launched.step.result()
        with self._changed:
            outputs = self._scheduler.update(launched.batch, result)
            started_s = max(launched.started_s, self._step_ended_s)
            self._step_ended_s = self._last_progress_s = time.monotonic()
            seconds = self._step_ended_s - started_s
            if not result.was_given_up:  # that says nothing of how long steps take
                is_beside = self._scheduler.num_acquiring > 0
                num_tokens = self._meter.record(launched.batch, seconds, self._scheduler.running, is_beside=is_beside)
                self._scheduler.pace.observe(launched.batch, seconds)
                outputs.step = StepFigures(seconds, num_tokens)
            self._is_woken = True
        return outputs

    def _deliver(self, outputs: StepOutputs) -> None:
        if not outputs.is_empty:
            self._on_step(outputs)

    def _abort_all(self) -> None:
        with self._changed:
            self._is_stopping = True
            self._scheduler.abort_all()
            outputs = self._scheduler.take_outputs()
        self._deliver(outputs)

    def _wake(self) -> None:
        self._is_woken = True
        self._changed.notify()

    def _prepare(self, sequence: Sequence) -> None:
        check_admissible(sequence, self._config, self._pool.num_blocks)
        self._scheduler.tables.name_blocks(sequence, sequence.num_tokens // self._config.block_size)

    def _check_open(self, num_new: int) -> None:
        if self._failure:
            raise InternalError(f"the engine stopped: {self._failure}")
        if self._is_stopping:
            raise Unavailable("the engine is stopping")
        num_waiting = self._scheduler.num_waiting + self._scheduler.num_acquiring
        if num_new and num_waiting + num_new > self._config.max_waiting:
            raise Overloaded(f"{num_waiting} sequences wait already, the limit is {self._config.max_waiting}")

    def _note_progress_if_idle(self) -> None:
        if not self._scheduler.has_work:
            self._last_progress_s = time.monotonic()
