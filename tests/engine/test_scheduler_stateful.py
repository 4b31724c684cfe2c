"""Whatever happens in whatever order: the books agree, nobody attends to foreign KV, everybody ends exactly once."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shared.engine.sequence import FinishReason
from tests.engine.fake_runner import Bench, LateStep, continuation, merge, prompt, sequence

NUM_BLOCKS = 14


class SchedulerMachine(RuleBasedStateMachine):
    """A worker in small: steps, in whose flight everything else may happen, fetches, peers' pins, saves, aborts."""

    max_in_flight = 1

    def __init__(self):
        super().__init__()
        self.bench = Bench(num_blocks=NUM_BLOCKS, max_batch_tokens=12, max_sequences=4, max_overtakes=3)
        self.bench.runner.may_give_up = self.max_in_flight == 1
        self.submitted = []
        self.aborted = set()
        self.released = set()
        self.in_flight = []
        self.fetches = []  # (sequence, first block, slots)
        self.quarantined = []
        self.pins = []
        self.saving = []
        self.num_sessions = 0
        self.branched = 0

    # The step thread

    @precondition(lambda self: len(self.in_flight) < self.max_in_flight)
    @rule()
    def begin_step(self):
        scheduler = self.bench.scheduler
        if self.in_flight:
            scheduler.assume(self.in_flight[-1].batch)
        batch = scheduler.schedule()
        if batch.scheduled:
            self.in_flight.append(LateStep(self.bench.runner, batch))
        else:
            merge(self.bench.outputs, scheduler.take_outputs())

    @precondition(lambda self: self.in_flight)
    @rule()
    def end_step(self):
        step = self.in_flight.pop(0)
        merge(self.bench.outputs, self.bench.scheduler.update(step.batch, step.result()))

    @rule()
    def whole_steps(self):
        for _ in range(4):
            if len(self.in_flight) < self.max_in_flight:
                self.begin_step()
            if self.in_flight:
                self.end_step()

    # The event loop thread

    @rule(
        length=st.integers(1, 30),
        seed=st.integers(0, 2),
        max_tokens=st.integers(1, 8),
        num_choices=st.sampled_from([1, 1, 2, 3]),
        acquiring=st.booleans(),
        priority=st.integers(0, 1),
    )
    def submit(self, length, seed, max_tokens, num_choices, acquiring, priority):
        self.num_sessions += 1
        fields = {"session": str(self.num_sessions), "acquiring": acquiring, "priority": priority}
        choices = [sequence(prompt(length, seed), max_tokens, choice=c, **fields) for c in range(num_choices)]
        self.bench.submit(*choices)
        self.submitted += choices

    @rule(length=st.integers(1, 14), seed=st.integers(0, 2))
    def submit_root(self, length, seed):
        """A sequence of one token, which others may branch off."""
        self.num_sessions += 1
        one = sequence(prompt(length, seed), 1, session=str(self.num_sessions), keeps_blocks=True)
        self.bench.submit(one)
        self.submitted.append(one)

    @precondition(lambda self: self.ended_roots())
    @rule(data=st.data(), count=st.integers(0, 3), more=st.integers(0, 2))
    def branch(self, data, count, more):
        """Some branches know the next token, some others, some keep their blocks for branches of their own."""
        root = data.draw(st.sampled_from(self.ended_roots()))
        self.branched += 1
        tokens = list(root.token_ids)
        news = [
            sequence(tokens[: len(tokens) - number % 2] + [7] * (number % 2 + more), 1 + more, keeps_blocks=not more,
                     session=str(root.session_id) + "b" * self.branched, choice=number)
            for number in range(count)
        ]  # fmt: skip
        self.bench.branch([root], *((root, one) for one in news))
        self.submitted += news
        self.released.add(root)

    def ended_roots(self):
        return [s for s in self.submitted if s.keeps_blocks and s.is_finished and s not in self.released]

    @rule(num_blocks=st.integers(1, 8), seed=st.integers(0, 2))
    def submit_prefill(self, num_blocks, seed):
        self.num_sessions += 1
        one = sequence(prompt(4 * num_blocks, seed), 0, session=str(self.num_sessions))
        self.bench.submit(one)
        self.submitted.append(one)

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def abort(self, data):
        one = data.draw(st.sampled_from(self.submitted))
        self.bench.scheduler.abort([one.sequence_id])
        self.aborted.add(one)

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def release(self, data):
        one = data.draw(st.sampled_from(self.submitted))
        if one.is_finished:
            self.bench.scheduler.tables.release(one)
            self.released.add(one)

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def attach_cached(self, data):
        self.bench.acquisition.attach_cached(data.draw(st.sampled_from(self.submitted)))

    @precondition(lambda self: self.submitted)
    @rule(data=st.data(), n=st.integers(1, 3))
    def begin_fetch(self, data, n):
        one = data.draw(st.sampled_from(self.submitted))
        first = len(one.block_table)
        n = min(n, len(one.block_hashes) - first)
        slots = self.bench.acquisition.reserve(one, n) if n > 0 else []
        if slots:
            self.fetches.append((one, one.token_ids[: one.num_prompt_tokens], first, slots))

    @precondition(lambda self: self.fetches)
    @rule(data=st.data(), num_verified=st.integers(0, 3))
    def end_fetch(self, data, num_verified):
        one, tokens, first, slots = self.fetches.pop(data.draw(st.integers(0, len(self.fetches) - 1)))
        good, bad = slots[:num_verified], slots[num_verified:]
        self.bench.runner.fill(good, tokens, first)
        self.bench.acquisition.commit(one, good, one.block_hashes[first : first + len(good)])
        if data.draw(st.booleans()):
            self.bench.acquisition.discard(bad)
        else:
            self.bench.acquisition.quarantine(bad)
            self.quarantined += bad

    @precondition(lambda self: self.quarantined)
    @rule()
    def release_quarantined(self):
        self.bench.acquisition.release_quarantined(self.quarantined)
        self.quarantined = []

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def make_ready(self, data):
        self.bench.scheduler.make_ready(data.draw(st.sampled_from(self.submitted)))

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def pin(self, data):
        one = data.draw(st.sampled_from(self.submitted))
        self.pins += [b for b in map(self.bench.pool.pin, one.block_hashes[:2]) if b >= 0]

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self):
        self.bench.pool.unpin(self.pins.pop())

    @rule()
    def begin_saving(self):
        self.saving += self.bench.pool.take_unsaved(2)

    @precondition(lambda self: self.saving)
    @rule(ok=st.booleans())
    def end_saving(self, ok):
        self.bench.pool.saved(self.saving.pop()[1], ok=ok)

    # What must hold

    @invariant()
    def books_agree(self):
        self.bench.check()

    @invariant()
    def sealed_prefill_keeps_its_blocks_until_released(self):
        for one in self.submitted:
            if one.finish_reason is FinishReason.SEALED and one not in self.released:
                assert self.bench.pool.match_prefix(one.block_hashes) == one.block_table

    def teardown(self):
        bench = self.bench
        while self.in_flight:
            self.end_step()
        for _, _, _, slots in self.fetches:
            bench.acquisition.discard(slots)
        self.release_quarantined()
        while self.pins:
            self.unpin()
        while self.saving:
            self.end_saving(True)
        for one in self.submitted:
            bench.scheduler.make_ready(one)
        num_finished = -1
        while num_finished < len(bench.outputs.finished):  # releasing what finished makes room for the rest
            num_finished = len(bench.outputs.finished)
            for one in bench.outputs.finished:
                bench.scheduler.tables.release(one)
            bench.run()
        for one in bench.outputs.finished:
            bench.scheduler.tables.release(one)
        self.everybody_ended_once_with_the_right_tokens()
        counts = bench.pool.counts()
        assert counts.free + counts.cached == NUM_BLOCKS

    def everybody_ended_once_with_the_right_tokens(self):
        assert Counter(s.sequence_id for s in self.bench.outputs.finished) == Counter(
            s.sequence_id for s in self.submitted
        )
        for one in self.submitted:
            if one.finish_reason is FinishReason.LENGTH:
                expected = continuation(one.token_ids[: one.num_prompt_tokens], one.sampling.max_tokens)
                assert one.token_ids[one.num_prompt_tokens :] == expected
            else:
                assert one.finish_reason is FinishReason.SEALED or one in self.aborted
        tokens = Counter(one.sequence_id for one, *_ in self.bench.outputs.tokens)
        assert all(tokens[one.sequence_id] == one.num_output_tokens for one in self.submitted)


class PipelinedMachine(SchedulerMachine):
    """The next step begins before the outcome of the last is known."""

    max_in_flight = 2


TestPipelinedScheduler = PipelinedMachine.TestCase
TestPipelinedScheduler.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)

TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
