"""Sequences that begin with the same tokens share a block that is not full, and copy it when they write to it."""

import pytest

from shared.engine.sequence import SequenceStatus
from shared.errors import InternalError
from tests.engine.fake_runner import Bench, LateStep, continuation, merge, prompt, sequence


def root_of(bench, num_tokens, **fields):
    """A sequence that ended with its first token and keeps its blocks."""
    root = sequence(prompt(num_tokens), 1, session="root", keeps_blocks=True, **fields)
    bench.submit(root)
    bench.run()
    assert root.is_finished
    return root


def branches_of(root, count, *, max_tokens=1, **fields):
    """Continuations of it by different tokens."""
    tokens = root.token_ids[:-1]
    return [
        sequence([*tokens, number], max_tokens, session="branches", choice=number, **fields) for number in range(count)
    ]


def copies_of(bench):
    """Steps until nothing can run; returns the copies made."""
    made = []
    while (batch := bench.scheduler.schedule()).scheduled:
        made += batch.copies
        merge(bench.outputs, bench.scheduler.update(batch, bench.runner.execute(batch)))
        bench.check()
    return made


@pytest.mark.parametrize("count", [1, 2, 5])
def test_branches_of_a_begun_block_compute_one_token_each_and_the_last_needs_no_copy(count):
    bench = Bench()
    root = root_of(bench, 10)
    branches = branches_of(root, count)
    bench.branch([root], *((root, one) for one in branches))
    assert bench.pool.counts().used == 3
    copies = copies_of(bench)
    assert len(copies) == count - 1
    assert bench.runner.batches[-1] == [(one.sequence_id, 10, 1) for one in branches]
    assert all(one.token_ids[-1:] == continuation(one.token_ids[:-1], 1) for one in branches)
    assert bench.pool.counts().used == 0


def test_branches_at_a_border_share_full_blocks_and_copy_nothing():
    bench = Bench()
    root = root_of(bench, 8)
    branches = branches_of(root, 3)
    bench.branch([root], *((root, one) for one in branches))
    assert copies_of(bench) == []
    assert bench.runner.batches[-1] == [(one.sequence_id, 8, 1) for one in branches]


def test_branches_hold_no_more_than_their_own_last_blocks():
    bench = Bench()
    root = root_of(bench, 10)
    branches = branches_of(root, 3, max_tokens=9)
    bench.branch([root], *((root, one) for one in branches))
    bench.step()
    assert bench.pool.counts().used == 2 + 3
    assert len({one.block_table[2] for one in branches}) == 3
    bench.run()
    for one in branches:
        assert one.token_ids[11:] == continuation(one.token_ids[:11], 9)


def test_first_choice_writes_on_in_place_while_the_others_copy():
    bench = Bench()
    choices = [sequence(prompt(11), max_tokens=9, choice=number) for number in range(3)]
    bench.submit(*choices)
    bench.step()
    block = choices[0].block_table[2]
    batch = bench.scheduler.schedule()
    assert [copy.source for copy in batch.copies] == [block, block]
    assert choices[0].block_table[2] == block
    merge(bench.outputs, bench.scheduler.update(batch, bench.runner.execute(batch)))
    bench.run()
    assert {tuple(one.token_ids[11:]) for one in choices} == {tuple(continuation(prompt(11), 9))}


def test_a_source_is_not_given_away_before_its_copy_is_made():
    bench = Bench(num_blocks=6)
    root = root_of(bench, 10)
    branches = branches_of(root, 2)
    bench.branch([root], *((root, one) for one in branches))
    step = LateStep(bench.runner, bench.scheduler.schedule())
    (copy,) = step.batch.copies
    bench.scheduler.abort([one.sequence_id for one in branches])
    taken = bench.pool.allocate(bench.pool.num_allocatable) or []
    assert copy.source not in taken
    for block in taken:
        bench.pool.unref(block)
    merge(bench.outputs, bench.scheduler.update(step.batch, step.result()))
    assert [reason for _, reason in bench.finished] == ["length", "aborted", "aborted"]
    assert bench.pool.counts().used + bench.pool.counts().pinned == 0
    bench.check()


def test_what_ended_gives_its_blocks_up_where_room_is_needed_and_its_branches_compute_anew():
    bench = Bench(num_blocks=4)
    root = root_of(bench, 10)
    other = sequence(prompt(15, seed=1), 1, session="other")
    bench.submit(other)
    bench.run()
    assert other.is_finished
    assert bench.pool.counts().used == 0
    branch = branches_of(root, 1, max_tokens=3)[0]
    bench.branch([root], (root, branch))
    bench.run()
    assert branch.token_ids[11:] == continuation(branch.token_ids[:11], 3)


def test_branches_that_were_preempted_resume_with_the_same_tokens():
    bench = Bench(num_blocks=10, max_sequences=4)
    root = root_of(bench, 10)
    branches = branches_of(root, 4, max_tokens=20)
    bench.branch([root], *((root, one) for one in branches))
    bench.run()
    assert bench.scheduler.preemption.count > 0
    for one in branches:
        assert one.token_ids[11:] == continuation(one.token_ids[:11], 20)
    assert bench.pool.counts().used == 0


def test_an_aborted_sequence_keeps_nothing():
    bench = Bench()
    root = sequence(prompt(10), 5, session="root", keeps_blocks=True)
    bench.submit(root)
    bench.step()
    bench.scheduler.abort([root.sequence_id])
    assert bench.pool.counts().used == 0
    bench.scheduler.tables.release(root)
    bench.check()


def test_what_a_step_in_flight_has_is_not_given_up_by_a_release():
    bench = Bench(max_batch_tokens=8)
    root = sequence(prompt(20), 5, session="root", keeps_blocks=True)
    bench.submit(root)
    steps = []
    for _ in range(2):  # as on a device: the second chunk is launched while the first is computed
        if steps:
            bench.scheduler.assume(steps[-1].batch)
        steps.append(LateStep(bench.runner, bench.scheduler.schedule()))
    bench.scheduler.abort([root.sequence_id])
    for step in steps:
        merge(bench.outputs, bench.scheduler.update(step.batch, step.result()))
        assert root.is_finished
        bench.scheduler.tables.release(root)
        bench.check()
    assert bench.pool.counts().used == 0


def test_everything_kept_or_under_way_is_free_after_a_failed_step():
    bench = Bench()
    root = root_of(bench, 10)
    branches = branches_of(root, 3)
    bench.branch([], *((root, one) for one in branches))
    assert len(bench.scheduler.schedule().copies) == 3  # the one that ended still has the block
    bench.scheduler.abort_all()
    counts = bench.pool.counts()
    assert (counts.used, counts.pinned) == (0, 0)
    bench.check()


def test_only_equal_tokens_of_one_namespace_are_borrowed():
    bench = Bench()
    root = root_of(bench, 10)
    early = sequence([*root.token_ids[:6], 3, 4, 5, 6], 1, session="a")
    late = sequence([*root.token_ids[:9], 3, 4], 1, session="b")
    foreign = sequence(root.token_ids, 1, session="c")
    foreign.namespace = bytes(16)
    bench.branch([root], (root, early), (root, late), (root, foreign))
    assert [one.num_computed_tokens for one in (early, late, foreign)] == [6, 9, 0]
    assert late.status is SequenceStatus.WAITING


def test_two_owners_of_one_block_are_found_out():
    bench = Bench()
    root = root_of(bench, 10)
    (branch,) = branches_of(root, 1)
    bench.branch([], (root, branch))
    branch.borrows_tail = False
    with pytest.raises(InternalError, match="two owners"):
        bench.check()
