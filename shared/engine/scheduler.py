"""Decides what each step computes.

One idea: every sequence's `num_computed_tokens` catches up with its tokens. A step hands out a budget of tokens: first
one to each sequence that decodes, then chunks to prompts that have begun, then to waiting sequences that fit. So
prefill, chunked prefill, decode and recompute after preemption are one case, and decode never waits behind a prompt.

The scheduler keeps three groups (`preemption.py` says who yields when memory runs out):

    acquiring (WAITING_FOR_KV) --make_ready--> waiting (WAITING) --admitted--> running (RUNNING) --> finished
                                                            ^---- preempted ----'
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from shared.engine.block_pool import BlockPool
from shared.engine.block_tables import BlockTables
from shared.engine.config import EngineConfig
from shared.engine.fair_share import FairShare
from shared.engine.preemption import Preemption
from shared.engine.prefill_pace import MIN_CHUNK_TOKENS, PrefillPace
from shared.engine.sequence import PENDING_TOKEN, FinishReason, Sequence, SequenceStatus
from shared.engine.siblings import Siblings
from shared.engine.step import ScheduledSequence, StepBatch, StepOutputs, StepResult, TokenLogprobs
from shared.engine.step_budget import StepBudget
from shared.engine.steps_in_flight import StepsInFlight
from shared.engine.waiting_queue import Waiting, WaitingQueue
from shared.errors import InternalError
from shared.identity import BlockId, SequenceId


class Scheduler:
    """Owns the queues and every unfinished sequence. Guarded by the engine's lock.

    Between `schedule()` and the matching `update()` a step is in flight without the lock: sequences in it keep their
    blocks until `update()`, whatever happens to them meanwhile. After `assume()` the next step can be scheduled before
    that: its sequences count the tokens of the first as computed and, where it samples, hold a token yet unknown.

    Attributes:
        tables: Block tables of the sequences.
        pace: Bounds steps by time; to be told what each step took.
        preemption: Makes room when memory runs out.
        prefix_query_tokens, prefix_hit_tokens: Prompt tokens looked up in the prefix cache, and found there or fetched.
    """

    def __init__(self, pool: BlockPool, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._config = config
        self._clock = clock
        self.tables = BlockTables(pool)
        self.pace = PrefillPace(config.max_step_s, max(MIN_CHUNK_TOKENS, pool.block_size))
        self._sequences: dict[SequenceId, Sequence] = {}
        self._siblings = Siblings()
        self._acquiring: dict[SequenceId, Sequence] = {}
        self._share = FairShare()
        self._waiting = WaitingQueue(config.policy, config.max_overtakes)
        self._running: list[Sequence] = []
        self._flights = StepsInFlight()
        self._last_batch = StepBatch([])
        self._outputs = StepOutputs()
        self.preemption = Preemption(
            pool,
            self.tables,
            acquiring=self._acquiring,
            waiting=self._waiting,
            running=self._running,
            siblings=self._siblings,
        )
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    # What there is

    @property
    def running(self) -> list[Sequence]:
        """Running sequences, longest running first; not to be changed."""
        return self._running

    @property
    def num_waiting(self) -> int:
        """Sequences ready to run."""
        return len(self._waiting)

    @property
    def num_acquiring(self) -> int:
        """Sequences that wait for KV."""
        return len(self._acquiring)

    @property
    def has_work(self) -> bool:
        """Some sequence runs or is ready to; choices that wait for a first one's fetches are not."""
        return bool(self._running) or any(not self._siblings.must_wait(entry.sequence) for entry in self._waiting)

    def queued_prefill_tokens(self) -> int:
        """Tokens to compute before everything present decodes, counting no cache hits of waiting sequences."""
        waiting = sum(entry.sequence.num_uncomputed_tokens for entry in self._waiting)
        return waiting + sum(s.num_uncomputed_tokens for s in self._running if not s.decodes)

    # Coming and going

    def add(self, sequence: Sequence, branches_off: Sequence | None = None) -> None:
        """Takes a sequence in, WAITING or WAITING_FOR_KV; that it is admissible was checked.

        Args:
            sequence: Begins with what blocks it has.
            branches_off: Gives it the blocks that it, having ended, keeps.
        """
        assert sequence.sequence_id not in self._sequences, f"sequence {sequence.sequence_id} was submitted twice"
        self._sequences[sequence.sequence_id] = sequence
        self._siblings.add(sequence)
        self._share.enter(sequence)
        if sequence.status is SequenceStatus.WAITING_FOR_KV:
            self._acquiring[sequence.sequence_id] = sequence
        else:
            if branches_off is not None:
                self.tables.branch(sequence, branches_off)
            self._waiting.add(sequence)

    def is_acquiring(self, sequence: Sequence) -> bool:
        """It still waits for KV: neither made ready nor ended."""
        return sequence.sequence_id in self._acquiring

    def make_ready(self, sequence: Sequence) -> None:
        """WAITING_FOR_KV -> WAITING; does nothing to a sequence that left that state already."""
        if self._acquiring.pop(sequence.sequence_id, None) is not None:
            sequence.status = SequenceStatus.WAITING
            self._waiting.add(sequence)

    def abort(self, sequence_ids: Iterable[SequenceId]) -> None:
        """Ends sequences; ids of finished or unknown ones are ignored.

        Blocks are free at once, or after the step in flight if the sequence is part of it. A step in which nobody else
        is may end early.
        """
        for sequence_id in sequence_ids:
            sequence = self._sequences.get(sequence_id)
            if sequence is not None and not self._flights.abort(sequence):
                self._finish(sequence, FinishReason.ABORTED)
        if self._flights.are_unwanted:
            self._last_batch.unwanted.value = 1

    def abort_all(self) -> None:
        """Ends everything; no step may be in flight, or it must have failed."""
        self.tables.tails.end_all()
        for sequence in self._flights.clear():
            self.tables.drop(sequence)
        for sequence in list(self.tables.kept.values()):
            self.tables.release(sequence)
        self.abort(list(self._sequences))

    # One step

    def schedule(self) -> StepBatch:
        """Chooses what the next step computes and gives it blocks; empty if nothing can run now.

        With a step in flight, `assume` it first; the result is also empty where the next depends on its outcome.
        """
        if self._flights and not self._can_run_ahead():
            return StepBatch([])
        aside = self._share.stepping_aside(self._running, self._waiting)
        if aside and not self._flights:
            self.preemption.make_way(aside, max_sequences=self._config.max_sequences)
        scheduled = self._schedule_step(aside)
        if aside and not scheduled:
            scheduled = self._schedule_step(frozenset())
        self._share.serve(scheduled)
        self._flights.begin(scheduled)
        self._last_batch = StepBatch(scheduled, self.tables.tails.take())
        return self._last_batch

    def _schedule_step(self, aside: frozenset[str]) -> list[ScheduledSequence]:
        num_preemptions = self.preemption.count
        scheduled = self._schedule_running(aside)
        while not (scheduled or aside or self._flights) and self._running and self.preemption.yield_blocks():
            scheduled = self._schedule_running(aside)
        if self._waiting and self.preemption.count == num_preemptions:
            scheduled += self._schedule_waiting(scheduled, aside)
        return scheduled

    def assume(self, batch: StepBatch) -> None:
        """Counts a step in flight as computed, so that the next one can be scheduled; `update` tells its tokens."""
        for entry in batch.scheduled:
            if not entry.sequence.is_finished:
                entry.assume()

    def update(self, batch: StepBatch, result: StepResult) -> StepOutputs:
        """Takes in what the step computed; returns everything that changed since the last outputs."""
        if batch.copies:
            self.tables.tails.end(batch.copies)
        if result.was_given_up:
            self._forget(batch)
            return self.take_outputs()
        for pooled in result.pooled:
            pooled.sequence.add_pooled(pooled.total, pooled.end - pooled.start)
        for scores in result.prompt_scores:
            scores.sequence.num_scored_tokens += len(scores.logprobs)
            self._outputs.prompt_scores.append(scores)
        token_ids, num_sampled = result.token_ids, 0
        for entry in batch.scheduled:
            sequence, token = entry.sequence, None
            if entry.samples:
                token = token_ids[num_sampled], result.logprobs[num_sampled]
                num_sampled += 1
            is_aborted = self._flights.end(sequence)
            if sequence.status is not SequenceStatus.FINISHED:
                self._settle(entry, token, is_aborted=is_aborted)
            elif self._flights.has_left(sequence):
                self.tables.drop(sequence)
        assert num_sampled == len(token_ids) == len(result.logprobs), "a token per sampling sequence"
        return self.take_outputs()

    def _forget(self, batch: StepBatch) -> None:
        """Ends the sequences of a step that ended early; nothing of it is computed, sealed or told."""
        for entry in batch.scheduled:
            sequence, is_aborted = entry.sequence, self._flights.end(entry.sequence)
            if sequence.status is not SequenceStatus.FINISHED:
                assert is_aborted, "somebody wanted the step"
                self._finish(sequence, FinishReason.ABORTED)
            elif self._flights.has_left(sequence):
                self.tables.drop(sequence)

    def _settle(
        self, entry: ScheduledSequence, token: tuple[int, TokenLogprobs | None] | None, *, is_aborted: bool
    ) -> None:
        """Takes in what a step computed for a sequence that has not ended meanwhile."""
        sequence = entry.sequence
        end = entry.assume()
        has_sealed = end // self._pool.block_size > sequence.num_sealed_blocks and self.tables.seal_computed(
            sequence, end, may_merge=sequence not in self._flights
        )
        if is_aborted:
            self._finish(sequence, FinishReason.ABORTED)
        elif token is not None:
            self._take_token(sequence, end, *token)
        elif sequence.is_prefill_only:
            self._report_prefill(sequence, end, has_sealed)

    def take_outputs(self) -> StepOutputs:
        """Everything that changed since the last call or update."""
        outputs, self._outputs = self._outputs, StepOutputs()
        outputs.sealed, outputs.evicted = self._pool.drain_events()
        return outputs

    @property
    def has_urgent_outputs(self) -> bool:
        """Somebody waits for an output that is there already."""
        return bool(self._outputs.finished or self._outputs.prefilled)

    # Scheduling

    def _can_run_ahead(self) -> bool:
        """The next step needs neither the tokens of the one in flight nor any of its blocks."""
        return self.preemption.can_grow() and not any(
            s.sampling is not None and s.sampling.depends_on_output for s in self._running
        )

    def _schedule_running(self, aside: frozenset[str]) -> list[ScheduledSequence]:
        if len(self._running) > self._pool.num_allocatable:
            self.preemption.make_room_for_decodes()
        running = [s for s in self._running if s.tenant not in aside] if aside else self._running
        scheduled: list[ScheduledSequence] = []
        num_prompts = 0
        block_size, grow = self._pool.block_size, self.tables.grow
        for s in running:  # every sequence at every step: nothing is called that most do not need
            num_tokens, num_computed = len(s.token_ids), s.num_computed_tokens
            if num_tokens - num_computed != 1:
                num_prompts += 1
            elif s.token_ids[-1] == PENDING_TOKEN and s.is_complete:
                continue
            elif (num_tokens <= len(s.block_table) * block_size and not s.borrows_tail) or grow(s, num_tokens):
                scheduled.append(ScheduledSequence(s, num_computed, 1, s.sampling is not None))
        if not num_prompts:
            return scheduled
        tokens = self._prompt_tokens_left(scheduled)
        for sequence in running:
            if tokens > 0 and not sequence.decodes:
                chunk = self._grow_by_chunk(sequence, tokens)
                if chunk:
                    scheduled.append(ScheduledSequence.next_of(sequence, chunk))
                    tokens -= chunk
        return scheduled

    def _prompt_tokens_left(self, scheduled: list[ScheduledSequence]) -> int:
        """Tokens of prompts that the step may compute beside what is in it."""
        num_decodes = len([True for entry in scheduled if entry.num_new_tokens == 1])
        num_chunked = sum(entry.num_new_tokens for entry in scheduled) - num_decodes
        limit = self.pace.limit(self._config.max_batch_tokens - num_decodes, beside_decodes=num_decodes > 0)
        return limit - num_chunked

    def _schedule_waiting(self, scheduled: list[ScheduledSequence], aside: frozenset[str]) -> list[ScheduledSequence]:
        budget = StepBudget(
            tokens=self._prompt_tokens_left(scheduled),
            sequences=self._config.max_sequences - len(self._running),
            blocks=self.preemption.num_spare_blocks(),
        )
        started = []
        for sequence in self._admissible(budget, aside):
            self._start(sequence)
            chunk = self._grow_by_chunk(sequence, budget.tokens)
            if chunk:
                started.append(ScheduledSequence.next_of(sequence, chunk))
                budget.tokens -= chunk
                budget.sequences -= 1
        return started

    def _admissible(self, budget: StepBudget, aside: frozenset[str]) -> Iterator[Sequence]:
        """Waiting sequences that fit, senior first, cached blocks attached; looks past a bounded number of others."""
        if budget.is_spent:  # as in most steps under load: nobody is put in order for nothing
            return
        num_skipped = 0
        for entry in self._share.order([e for e in self._waiting if e.sequence.tenant not in aside]):
            if budget.is_spent or num_skipped > self._config.max_skip_ahead:
                return
            if self._siblings.must_wait(entry.sequence):
                continue
            if self._fit(entry, budget):
                yield entry.sequence
            elif entry.is_aged:
                return
            else:
                num_skipped += 1

    def _fit(self, entry: Waiting, budget: StepBudget) -> bool:
        sequence = entry.sequence
        matched = self.tables.match(sequence)
        needed = self._blocks_taken(sequence, matched)
        # Nothing else will make room: either nobody runs, or whoever does is not to be followed by anybody else.
        can_shed, memory = entry.is_aged or not self._running, self.preemption
        while needed > budget.blocks and can_shed and memory.shed(junior_to=sequence):
            needed, budget.blocks = self._blocks_taken(sequence, matched), memory.num_spare_blocks()
        if needed > budget.blocks:
            return False
        self.tables.attach(sequence, matched)
        if leader := self._siblings.leader_of(sequence):
            self.tables.borrow_tail(sequence, leader)
        budget.blocks -= needed
        return True

    def _blocks_taken(self, sequence: Sequence, matched: list[BlockId]) -> int:
        """By how many the allocatable blocks shrink when the sequence is computed after attaching `matched`."""
        num_revived = sum(map(self._pool.is_idle, matched))
        return self.tables.num_missing_blocks(sequence) - len(matched) + num_revived

    def _start(self, sequence: Sequence) -> None:
        self._waiting.admit(sequence)
        if not sequence.first_scheduled_s:
            sequence.first_scheduled_s = self._clock()
            self.prefix_query_tokens += sequence.num_prompt_tokens
            self.prefix_hit_tokens += sequence.num_cached_tokens
        sequence.status = SequenceStatus.RUNNING
        self._running.append(sequence)
        if sequence.is_prefill_only:
            self._report_prefill(sequence, sequence.num_computed_tokens, has_sealed=sequence.num_sealed_blocks > 0)

    def _grow_by_chunk(self, sequence: Sequence, max_tokens: int) -> int:
        """Tokens of the sequence's next chunk, blocks allocated; 0 if it is complete or there is no block."""
        start, block_size = sequence.num_computed_tokens, self._pool.block_size
        if not self.tables.grow(sequence, start):
            return 0
        held = len(sequence.block_table) * block_size
        room = held + self._pool.num_allocatable * block_size - start
        end = start + min(sequence.num_uncomputed_tokens, max_tokens, room)
        border = end - end % block_size
        if start < border and end < sequence.num_tokens:
            end = border  # an unfinished chunk ends where its last block can be sealed
        self.tables.grow(sequence, end)
        return end - start

    # Ending

    def _take_token(self, sequence: Sequence, index: int, token_id: int, logprobs: TokenLogprobs | None) -> None:
        sequence.token_ids[index] = token_id
        self._outputs.tokens.append((sequence, token_id, logprobs))
        sampling = sequence.sampling
        assert sampling is not None, "a prefill-only sequence was sampled"
        is_eos = token_id in self._config.eos_token_ids and not sampling.ignore_eos
        if is_eos or token_id in sampling.stop_token_ids:
            sequence.stop_token_id = token_id
            self._finish(sequence, FinishReason.STOP)
        elif index + 1 - sequence.num_prompt_tokens >= sampling.max_tokens:
            self._finish(sequence, FinishReason.LENGTH)

    def _report_prefill(self, sequence: Sequence, num_computed: int, has_sealed: bool) -> None:
        if has_sealed and sequence.pooling is None:
            self._outputs.prefilled.append(sequence)
        if num_computed == sequence.num_tokens:
            self._finish(sequence, FinishReason.SEALED if sequence.pooling is None else FinishReason.POOLED)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        del self._sequences[sequence.sequence_id]
        self._siblings.remove(sequence)
        self._share.leave(sequence)
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
        elif self._acquiring.pop(sequence.sequence_id, None) is None:
            self._waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        sequence.forget_pending_tokens()
        if reason is FinishReason.SEALED:
            self.tables.pin(sequence)
        elif not self._flights.leave(sequence):
            if sequence.keeps_blocks and reason is not FinishReason.ABORTED:
                self.tables.keep(sequence)
            else:
                self.tables.drop(sequence)
        self._outputs.finished.append(sequence)

    # Self-check

    def check_integrity(self, reserved: Iterable[BlockId] = ()) -> None:
        """Verifies the pool, and that its references are exactly those of the block tables and `reserved` slots.

        Raises:
            InternalError: They are not.
        """
        self._pool.check_integrity()
        self.tables.check_references([*self._sequences.values(), *self._flights.leaving], reserved)
        if len(self._sequences) != len(self._acquiring) + len(self._waiting) + len(self._running):
            raise InternalError("a sequence is in two groups or in none")
