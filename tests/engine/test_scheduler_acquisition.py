"""Sequences that get their KV from elsewhere, and what becomes of slots and tables when things go wrong."""

import pytest

from shared.engine.sequence import SequenceStatus
from tests.engine.fake_runner import Bench, continuation, prompt, sequence


def outputs_of(one):
    return one.token_ids[one.num_prompt_tokens :]


def test_fetched_blocks_are_not_computed_again():
    bench = Bench()
    one = sequence(prompt(22), acquiring=True)
    bench.submit(one)
    assert bench.acquisition.attach_cached(one) == 0
    assert bench.fetch(one, 2)
    assert bench.fetch(one, 3)
    assert bench.step() == []  # still acquiring
    bench.scheduler.make_ready(one)
    assert bench.step() == [(one.sequence_id, 20, 2)]
    bench.run()
    assert outputs_of(one) == continuation(prompt(22), 8)
    assert one.num_cached_tokens == 20


def test_cached_blocks_are_attached_before_anything_is_fetched():
    bench = Bench()
    bench.submit(sequence(prompt(12), session="earlier"))
    bench.run()
    one = sequence(prompt(30)[:12] + prompt(10, 5), acquiring=True)
    bench.submit(one)
    assert bench.acquisition.attach_cached(one) == 3
    assert bench.acquisition.attach_cached(one) == 3
    assert bench.fetch(one, 2)
    bench.scheduler.make_ready(one)
    assert bench.step() == [(one.sequence_id, 20, 2)]


def test_fetched_last_block_is_cached_but_its_last_token_is_computed():
    bench = Bench()
    one = sequence(prompt(8), acquiring=True)
    bench.submit(one)
    assert bench.fetch(one, 2)
    assert len(one.block_table) == 1
    assert bench.pool.counts().cached == 1
    bench.scheduler.make_ready(one)
    assert bench.step() == [(one.sequence_id, 4, 4)]


def test_block_that_was_computed_meanwhile_frees_its_slot():
    bench = Bench()
    one = sequence(prompt(9), acquiring=True, session="fetching")
    bench.submit(one)
    slots = bench.acquisition.reserve(one, 2)
    other = sequence(prompt(9), session="computing")
    bench.submit(other)
    bench.step()
    bench.runner.fill(slots, one.token_ids)
    bench.acquisition.commit(one, slots, one.block_hashes)
    assert one.block_table == other.block_table[:2]
    bench.check()


def test_commit_after_abort_leaves_the_blocks_to_the_cache():
    bench = Bench()
    one = sequence(prompt(9), acquiring=True)
    bench.submit(one)
    slots = bench.acquisition.reserve(one, 2)
    bench.scheduler.abort([one.sequence_id])
    assert bench.pool.counts().used == 2  # slots belong to the fetch
    bench.runner.fill(slots, one.token_ids)
    bench.acquisition.commit(one, slots, one.block_hashes)
    assert one.block_table == []
    assert bench.pool.counts().cached == 2
    assert bench.acquisition.reserve(one, 1) == []
    assert bench.acquisition.attach_cached(one) == 0
    bench.scheduler.make_ready(one)
    assert bench.step() == []


def test_discarded_slots_are_free_and_quarantined_ones_only_after_release():
    bench = Bench()
    one = sequence(prompt(30), acquiring=True)
    bench.submit(one)
    slots = bench.acquisition.reserve(one, 5)
    bench.acquisition.discard(slots[:2])
    bench.acquisition.quarantine(slots[2:])
    counts = bench.pool.counts()
    assert (counts.free, counts.quarantined, counts.used) == (61, 3, 0)
    bench.check()
    bench.acquisition.release_quarantined(slots[2:])
    assert bench.pool.counts().free == 64


def test_reservation_takes_no_block_that_running_sequences_will_want():
    bench = Bench(num_blocks=10, max_batch_tokens=8)
    running = sequence(prompt(24, 1), max_tokens=4, session="running")  # six blocks, two computed
    bench.submit(running)
    bench.step()
    one = sequence(prompt(30, 2), acquiring=True, session="one")
    bench.submit(one)
    assert bench.acquisition.reserve(one, 5) == []
    assert len(bench.acquisition.reserve(one, 4)) == 4
    bench.run()
    assert running.num_preemptions == 0


def test_decode_takes_blocks_of_those_that_only_wait():
    bench = Bench(num_blocks=8)
    running = sequence(prompt(12, 1), max_tokens=18, session="running")
    bench.submit(running)
    bench.step()
    one = sequence(prompt(17, 2), acquiring=True, session="one")
    bench.submit(one)
    assert bench.fetch(one, 3)
    bench.run()
    assert running.num_preemptions == 0
    assert outputs_of(running) == continuation(prompt(12, 1), 18)
    assert one.block_table == []
    bench.scheduler.make_ready(one)
    bench.run()
    assert outputs_of(one) == continuation(prompt(17, 2), 8)


def test_commit_continues_correctly_after_the_table_was_given_up():
    bench = Bench(num_blocks=9)
    running = sequence(prompt(12, 1), max_tokens=18, session="running")
    bench.submit(running)
    bench.step()
    one = sequence(prompt(17, 2), acquiring=True, session="one")
    bench.submit(one)
    assert bench.fetch(one, 2)
    slots = bench.acquisition.reserve(one, 2)
    while one.block_table:
        bench.step()
    bench.runner.fill(slots, one.token_ids, 2)
    bench.acquisition.commit(one, slots, one.block_hashes[2:4])
    assert one.block_table == []
    bench.scheduler.make_ready(one)
    bench.run()
    assert outputs_of(one) == continuation(prompt(17, 2), 8)
    assert outputs_of(running) == continuation(prompt(12, 1), 18)


@pytest.mark.parametrize("num_waiting", [2, 3, 5])
def test_waiting_sequences_that_hold_all_blocks_do_not_deadlock(num_waiting):
    bench = Bench(num_blocks=8)
    waiting = [sequence(prompt(29, i), max_tokens=4, session=str(i), acquiring=True) for i in range(num_waiting)]
    bench.submit(*waiting)
    while bench.fetch(waiting[0], 1) and bench.fetch(waiting[1], 1) and bench.pool.counts().free:
        pass
    for one in waiting:
        bench.scheduler.make_ready(one)
    bench.run()
    for i, one in enumerate(waiting):
        assert outputs_of(one) == continuation(prompt(29, i), 4)
    assert bench.pool.counts().used == 0


def test_senior_acquiring_sequence_takes_room_from_juniors():
    bench = Bench(num_blocks=8)
    senior, junior = (sequence(prompt(30, i), max_tokens=2, session=str(i), acquiring=True) for i in range(2))
    bench.submit(senior, junior)
    assert bench.fetch(junior, 6)
    assert bench.fetch(senior, 7)
    assert junior.block_table == []
    assert not bench.fetch(junior, 3)


def test_acquisition_does_not_pass_an_aged_sequence():
    bench = Bench(num_blocks=16, max_overtakes=2)
    bench.submit(sequence(prompt(16, 1), max_tokens=40, session="running"))
    bench.step()
    big = sequence(prompt(56, 2), max_tokens=2, session="big")
    bench.submit(big, *(sequence(prompt(4, 3 + i), max_tokens=1, session=f"small {i}") for i in range(2)))
    bench.step()
    late = sequence(prompt(12, 9), session="late", acquiring=True)
    bench.submit(late)
    assert big.status is SequenceStatus.WAITING
    assert bench.acquisition.reserve(late, 1) == []


def test_first_choice_may_fetch_though_a_sibling_that_waits_for_it_has_aged():
    bench = Bench(num_blocks=32, max_overtakes=2)
    first, second = sequence(prompt(21), acquiring=True), sequence(prompt(21), choice=1)
    bench.submit(first, second)
    bench.submit(*(sequence(prompt(4, 3 + i), max_tokens=1, session=f"other {i}") for i in range(3)))
    bench.run()
    assert bench.fetch(first, 5)
    bench.scheduler.make_ready(first)
    bench.run()
    assert outputs_of(first) == outputs_of(second) == continuation(prompt(21), 8)
