"""The engine with its thread; the runner waits for the test where the test wants to act during a step."""

import queue
import threading
import time

import pytest

from shared.engine.block_pool import BlockPool
from shared.engine.config import EngineConfig
from shared.engine.engine import Engine
from shared.engine.sequence import FinishReason
from shared.engine.step import StepOutputs
from shared.errors import CapacityExceeded, ConfigurationError, InternalError, Overloaded, Unavailable
from tests.engine.fake_runner import FakeRunner, continuation, merge, prompt, sequence

TIMEOUT_S = 20


class GatedRunner(FakeRunner):
    """Holds each step between `entered` and `proceed` while the gate is closed."""

    def __init__(self, num_blocks, block_size):
        super().__init__(num_blocks, block_size)
        self.is_gated = False
        self.entered = threading.Semaphore(0)
        self.proceed = threading.Semaphore(0)

    def execute(self, batch):
        if self.is_gated:
            self.entered.release()
            assert self.proceed.acquire(timeout=TIMEOUT_S)
        return super().execute(batch)


class Worker:
    """An engine and everything it said."""

    def __init__(self, num_blocks=64, **config):
        config = {"block_size": 4, "max_model_len": 2048, "max_batch_tokens": 32, "max_sequences": 8, **config}
        self.runner = GatedRunner(num_blocks, 4)
        self.messages = queue.SimpleQueue()
        self.outputs = StepOutputs()
        self.engine = Engine(self.runner, BlockPool(num_blocks, 4), EngineConfig(**config), self.messages.put)

    def __enter__(self):
        self.engine.start()
        return self

    def __exit__(self, *_):
        self.runner.is_gated = False
        self.runner.proceed.release(1000)
        self.engine.stop()
        self.engine.check_integrity()

    def next_message(self):
        message = self.messages.get(timeout=TIMEOUT_S)
        merge(self.outputs, message)
        return message

    def wait_until(self, condition):
        while not condition():
            self.next_message()

    def wait_finished(self, *sequences):
        self.wait_until(lambda: all(one in self.outputs.finished for one in sequences))

    def drain(self):
        while not self.messages.empty():
            self.next_message()

    def begin_step(self):
        """Returns when a forward pass is under way."""
        assert self.runner.entered.acquire(timeout=TIMEOUT_S)

    def end_step(self):
        self.runner.proceed.release()


def outputs_of(one):
    return one.token_ids[one.num_prompt_tokens :]


def test_submitted_sequences_run_to_their_end():
    with Worker() as worker:
        sequences = [sequence(prompt(5 + i, i), max_tokens=6, session=str(i)) for i in range(10)]
        worker.engine.submit(sequences)
        worker.wait_finished(*sequences)
        for i, one in enumerate(sequences):
            assert outputs_of(one) == continuation(prompt(5 + i, i), 6)
        stats = worker.engine.stats()
        assert (stats.running, stats.waiting, stats.blocks.used, stats.generated_tokens) == (0, 0, 0, 60)
        assert stats.steps > 0
        assert stats.prefill_tokens_per_s > 0


def test_a_step_takes_as_long_as_its_runner_computes(monkeypatch):
    with Worker() as worker:
        execute = worker.runner.execute
        monkeypatch.setattr(worker.runner, "execute", lambda batch: time.sleep(0.02) or execute(batch))
        one = sequence(prompt(30), max_tokens=1)
        worker.engine.submit([one])
        worker.wait_finished(one)
        stats = worker.engine.stats()
    assert stats.last_step_s >= 0.02
    assert 0 < stats.prefill_tokens_per_s <= 30 / 0.02


def test_a_slow_runner_gets_shorter_steps(monkeypatch):
    token_s = 5e-4
    with Worker(num_blocks=1024, max_batch_tokens=2048, max_step_s=0.04) as worker:
        execute = worker.runner.execute
        monkeypatch.setattr(
            worker.runner, "execute", lambda batch: time.sleep(batch.num_tokens * token_s) or execute(batch)
        )
        one = sequence(prompt(1000), max_tokens=1)
        worker.engine.submit([one])
        worker.wait_finished(one)
    chunks = [tokens for batch in worker.runner.batches for *_, tokens in batch]
    assert max(chunks) <= 0.04 / token_s
    assert sum(chunks) == 1000


def test_one_message_carries_all_outputs_of_a_step():
    with Worker() as worker:
        worker.runner.is_gated = True
        sequences = [sequence(prompt(4, i), max_tokens=2, session=str(i)) for i in range(5)]
        worker.engine.submit(sequences)
        worker.begin_step()
        worker.end_step()
        message = worker.next_message()
        assert [one for one, *_ in message.tokens] == sequences
        worker.begin_step()
        worker.end_step()
        message = worker.next_message()
        assert message.finished == sequences


def test_submission_is_all_or_nothing():
    with Worker(num_blocks=8) as worker:
        good, bad = sequence(prompt(4), session="a"), sequence(prompt(40), session="b")
        with pytest.raises(CapacityExceeded):
            worker.engine.submit([good, bad])
        assert worker.engine.stats().waiting == 0
        worker.engine.submit([good])
        worker.wait_finished(good)


def test_full_queue_refuses_with_both_numbers():
    with Worker(max_waiting=2) as worker:
        worker.engine.submit([sequence(prompt(4), acquiring=True, session=str(i)) for i in range(2)])
        with pytest.raises(Overloaded, match=r"2 sequences wait already, the limit is 2"):
            worker.engine.submit([sequence(prompt(4), session="late")])


def test_abort_between_steps_is_answered_without_a_step():
    with Worker() as worker:
        one = sequence(prompt(9), acquiring=True)
        worker.engine.submit([one])
        worker.engine.abort([one.sequence_id])
        worker.engine.abort([one.sequence_id])
        assert worker.next_message().finished == [one]
        assert worker.engine.stats().steps == 0
    worker.drain()
    assert worker.outputs.finished == [one]


def test_abort_in_the_step_in_flight_frees_after_it_and_answers_once():
    with Worker() as worker:
        worker.runner.is_gated = True
        one = sequence(prompt(9))
        worker.engine.submit([one])
        worker.begin_step()
        worker.engine.abort([one.sequence_id])
        assert worker.engine.stats().blocks.used == 3
        worker.engine.check_integrity()
        worker.end_step()
        message = worker.next_message()
        assert (message.finished, message.tokens) == ([one], [])
        assert worker.engine.stats().blocks.used == 0
        worker.engine.abort([one.sequence_id])
    worker.drain()
    assert worker.outputs.finished == [one]


def test_a_step_that_nobody_wants_any_more_may_end_early_and_leaves_nothing_behind():
    with Worker() as worker:
        worker.runner.is_gated = True
        gone = [sequence(prompt(12, i), max_tokens=0, session=str(i)) for i in range(2)]
        worker.engine.submit(gone)
        worker.begin_step()
        for one in gone:
            worker.engine.abort([one.sequence_id])
        worker.runner.is_gated = False
        worker.end_step()
        worker.wait_finished(*gone)
        assert worker.runner.given_up == 1
        stats = worker.engine.stats()
        assert (stats.blocks.used, stats.blocks.cached, stats.prefill_tokens_per_s) == (0, 0, 0.0)
        again = sequence(prompt(12), max_tokens=3)
        worker.engine.submit([again])
        worker.wait_finished(again)
        assert outputs_of(again) == continuation(prompt(12), 3)


def test_a_step_that_one_of_its_sequences_still_wants_is_computed_to_its_end():
    with Worker() as worker:
        worker.runner.is_gated = True
        gone, stays = (sequence(prompt(9, i), max_tokens=3, session=str(i)) for i in range(2))
        worker.engine.submit([gone, stays])
        worker.begin_step()
        worker.engine.abort([gone.sequence_id])
        worker.runner.is_gated = False
        worker.end_step()
        worker.wait_finished(gone, stays)
        assert worker.runner.given_up == 0
        assert outputs_of(stays) == continuation(prompt(9, 1), 3)


def test_abort_storm_leaves_nothing_behind():
    with Worker(num_blocks=32, max_waiting=100_000) as worker:
        sequences = [
            sequence(prompt(3 + i % 20, i % 7), 1 + i % 9, session=str(i // 2), acquiring=i % 3 == 0, choice=i % 2)
            for i in range(2000)
        ]
        for start in range(0, 2000, 50):
            worker.engine.submit(sequences[start : start + 50])
            worker.engine.abort(one.sequence_id for one in sequences[start : start + 50 : 2])
            for one in sequences[start : start + 50]:
                worker.engine.ready_for_schedule(one)
            worker.engine.abort(one.sequence_id for one in sequences[:start:3])
        worker.wait_finished(*sequences[-4:])
        worker.engine.abort(one.sequence_id for one in sequences)
        worker.wait_until(lambda: len(worker.outputs.finished) == 2000)
        stats = worker.engine.stats()
        assert stats.blocks.free + stats.blocks.cached == 32
        assert len({one.sequence_id for one in worker.outputs.finished}) == 2000
        after = sequence(prompt(30, 99), session="after")
        worker.engine.submit([after])
        worker.wait_finished(after)
        assert outputs_of(after) == continuation(prompt(30, 99), 8)


def test_commit_publishes_sealed_blocks_without_a_step():
    with Worker() as worker:
        one = sequence(prompt(9), acquiring=True)
        worker.engine.submit([one])
        assert worker.engine.attach_cached(one) == 0
        slots = worker.engine.reserve(one, 2)
        worker.runner.fill(slots, one.token_ids)
        worker.engine.commit(one, slots, one.block_hashes)
        worker.wait_until(lambda: worker.outputs.sealed == one.block_hashes)
        assert worker.engine.stats().steps == 0
        worker.engine.ready_for_schedule(one)
        worker.wait_finished(one)
        assert outputs_of(one) == continuation(prompt(9), 8)
        assert worker.runner.batches[0] == [(one.sequence_id, 8, 1)]


def test_fetch_commits_and_peers_pin_while_a_forward_pass_runs():
    with Worker(num_blocks=12) as worker:
        worker.runner.is_gated = True
        running = sequence(prompt(12, 1), max_tokens=2, session="running")
        worker.engine.submit([running])
        worker.begin_step()
        fetched = sequence(prompt(13, 2), max_tokens=3, session="fetched", acquiring=True)
        worker.engine.submit([fetched])
        slots = worker.engine.reserve(fetched, 3)
        worker.runner.fill(slots, fetched.token_ids)
        worker.engine.commit(fetched, slots, fetched.block_hashes)
        pinned = worker.engine.pin([*fetched.block_hashes, b"\0" * 16])
        assert pinned == [*slots, -1]
        worker.engine.abort([fetched.sequence_id])
        assert worker.engine.stats().blocks.pinned == 3
        worker.engine.check_integrity()
        worker.runner.is_gated = False
        worker.end_step()
        worker.wait_finished(running, fetched)
        assert outputs_of(running) == continuation(prompt(12, 1), 2)
        worker.engine.unpin(pinned)
        assert worker.engine.stats().blocks.pinned == 0


def test_prefill_only_sequence_stays_pinned_until_release_which_is_idempotent():
    with Worker(role="prefill") as worker:
        one = sequence(prompt(64), max_tokens=0)
        worker.engine.submit([one])
        worker.wait_finished(one)
        assert one.finish_reason is FinishReason.SEALED
        assert one.num_sealed_blocks == 16
        assert worker.outputs.sealed == one.block_hashes
        assert worker.engine.stats().blocks.pinned == 16
        worker.engine.abort([one.sequence_id])
        assert worker.engine.stats().blocks.pinned == 16
        worker.engine.release(one)
        worker.engine.release(one)
        assert worker.engine.stats().blocks.cached == 16
    worker.drain()
    assert worker.outputs.finished == [one]


def test_release_of_an_aborted_prefill_does_nothing():
    with Worker() as worker:
        one = sequence(prompt(8), max_tokens=0, acquiring=True)
        worker.engine.submit([one])
        worker.engine.release(one)
        worker.engine.abort([one.sequence_id])
        worker.engine.release(one)
        worker.wait_finished(one)
        assert worker.engine.stats().blocks.free == 64


def test_sequence_that_found_no_room_runs_as_soon_as_a_peer_lets_go():
    with Worker(num_blocks=8) as worker:
        donor = sequence(prompt(32), max_tokens=0, session="donor")
        worker.engine.submit([donor])
        worker.wait_finished(donor)
        one = sequence(prompt(8, 2), max_tokens=2, session="one")
        worker.engine.submit([one])
        assert worker.engine.stats().waiting == 1
        worker.engine.release(donor)
        worker.wait_finished(one)


def test_progress_stands_still_while_nothing_can_run_and_follows_the_clock_when_idle():
    with Worker(num_blocks=8) as worker:
        donor = sequence(prompt(32), max_tokens=0, session="donor")
        worker.engine.submit([donor])
        worker.wait_finished(donor)
        first = worker.engine.stats().last_progress_s
        assert worker.engine.stats().last_progress_s > first
        worker.engine.submit([sequence(prompt(8, 2), session="stuck")])
        stuck = worker.engine.stats().last_progress_s
        assert worker.engine.stats().last_progress_s == stuck
        worker.engine.release(donor)


def test_choices_that_wait_for_a_fetch_are_no_pending_work():
    with Worker() as worker:
        worker.engine.submit([sequence(prompt(20), acquiring=True), sequence(prompt(20), choice=1)])
        first = worker.engine.stats().last_progress_s
        assert worker.engine.stats().last_progress_s > first


def test_save_ahead_pins_until_saved():
    with Worker(num_blocks=16) as worker:
        one = sequence(prompt(56), max_tokens=1)
        worker.engine.submit([one])
        worker.wait_finished(one)
        taken = worker.engine.take_unsaved(2)
        assert len(taken) == 2
        assert worker.engine.stats().blocks.pinned == 2
        worker.engine.saved(taken, [True, False])
        assert worker.engine.stats().blocks.pinned == 0
        assert worker.engine.sealed_hashes() == one.block_hashes


def test_slots_of_a_lost_transfer_are_out_of_use_until_proven_quiet():
    with Worker(num_blocks=8) as worker:
        one = sequence(prompt(25), acquiring=True, max_tokens=4)
        worker.engine.submit([one])
        slots = worker.engine.reserve(one, 6)
        worker.engine.quarantine(slots[:3])
        worker.engine.discard(slots[3:])
        worker.engine.ready_for_schedule(one)
        assert worker.engine.stats().blocks.quarantined == 3
        assert not one.is_finished
        worker.engine.release_quarantined(slots[:3])
        worker.wait_finished(one)
        assert outputs_of(one) == continuation(prompt(25), 4)


def test_stop_ends_everything_as_aborted_and_refuses_what_comes_later():
    with Worker(num_blocks=600) as worker:
        running, acquiring = sequence(prompt(9), max_tokens=2000), sequence(prompt(9), acquiring=True, session="b")
        worker.engine.submit([running, acquiring])
        worker.next_message()
        worker.engine.stop()
        worker.drain()
        assert {one.finish_reason for one in worker.outputs.finished} == {FinishReason.ABORTED}
        assert len(worker.outputs.finished) == 2
        with pytest.raises(Unavailable):
            worker.engine.submit([sequence(prompt(9))])
        worker.engine.stop()
        worker.engine.abort([running.sequence_id])


def test_stop_before_start_also_ends_everything():
    worker = Worker()
    one = sequence(prompt(9))
    worker.engine.submit([one])
    worker.engine.stop()
    assert worker.next_message().finished == [one]


def test_failing_runner_ends_everything_and_is_reported():
    class FailingRunner(FakeRunner):
        def execute(self, batch):
            raise RuntimeError("no such kernel")

    messages = queue.SimpleQueue()
    config = EngineConfig(block_size=4, max_model_len=64)
    engine = Engine(FailingRunner(8, 4), BlockPool(8, 4), config, messages.put)
    engine.start()
    one, other = sequence(prompt(9)), sequence(prompt(9), acquiring=True, session="b")
    engine.submit([one, other])
    finished = []
    while len(finished) < 2:
        finished += messages.get(timeout=TIMEOUT_S).finished
    assert {s.finish_reason for s in finished} == {FinishReason.ABORTED}
    assert engine.stats().failure == "RuntimeError: no such kernel"
    assert engine.stats().blocks.used == 0
    with pytest.raises(InternalError, match="no such kernel"):
        engine.submit([sequence(prompt(9))])
    engine.stop()
    engine.check_integrity()


def test_pool_of_another_block_size_is_refused():
    with pytest.raises(ConfigurationError, match=r"block_size is 16, the pool's is 4"):
        Engine(FakeRunner(8, 4), BlockPool(8, 4), EngineConfig(block_size=16, max_model_len=64), print)


def test_threads_that_do_everything_at_once_keep_the_books_whole():
    with Worker(num_blocks=40, max_waiting=10_000) as worker:
        deadline = time.monotonic() + 1.5
        errors = []

        def client(index):
            try:
                count = 0
                while time.monotonic() < deadline:
                    count += 1
                    fields = {"session": f"{index}/{count}", "acquiring": count % 2 == 0}
                    one = sequence(prompt(5 + count % 40, count % 5), 1 + count % 5, **fields)
                    worker.engine.submit([one])
                    if count % 2 == 0:
                        held = worker.engine.attach_cached(one)
                        wanted = min(2, (one.num_prompt_tokens - 1) // 4 - held)
                        slots = worker.engine.reserve(one, wanted) if wanted > 0 else []
                        worker.runner.fill(slots, prompt(5 + count % 40, count % 5), held)
                        worker.engine.commit(one, slots[:1], one.block_hashes[held : held + len(slots[:1])])
                        worker.engine.discard(slots[1:])
                        worker.engine.ready_for_schedule(one)
                    pinned = worker.engine.pin(one.block_hashes[:3])
                    if count % 3 == 0:
                        worker.engine.abort([one.sequence_id])
                    worker.engine.check_integrity()
                    worker.engine.unpin(pinned)
                    submitted.append(one)
                    time.sleep(0.001)
            except Exception as exc:
                errors.append(exc)

        submitted = []
        threads = [threading.Thread(target=client, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        worker.wait_until(lambda: len(worker.outputs.finished) == len(submitted))
        assert worker.engine.stats().failure == ""
        for one in submitted:
            if one.finish_reason is FinishReason.LENGTH:
                length = one.num_prompt_tokens
                assert outputs_of(one) == continuation(one.token_ids[:length], one.sampling.max_tokens)
        counts = worker.engine.stats().blocks
        assert counts.free + counts.cached == counts.total
