import pytest

from shared.engine.policy import ShortestPrefillFirst
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import FinishReason, SequenceStatus
from shared.errors import CapacityExceeded, ConfigurationError, ContextLengthExceeded, InvalidRequest
from tests.engine.fake_runner import Bench, continuation, prompt, sequence


def outputs_of(one):
    return one.token_ids[one.num_prompt_tokens :]


def test_prompt_is_computed_then_decoded_token_by_token():
    bench = Bench()
    one = sequence(prompt(10), max_tokens=3)
    bench.submit(one)
    assert [bench.step() for _ in range(3)] == [
        [(one.sequence_id, 0, 10)],
        [(one.sequence_id, 10, 1)],
        [(one.sequence_id, 11, 1)],
    ]
    assert outputs_of(one) == continuation(prompt(10), 3)
    assert bench.finished == [(one.sequence_id, "length")]
    assert bench.pool.counts().used == 0


@pytest.mark.parametrize("length", [1, 3, 4, 5, 31, 32, 33, 63, 64, 65, 100])
def test_every_prompt_length_around_block_and_chunk_borders_gives_the_undisturbed_tokens(length):
    bench = Bench()
    one = sequence(prompt(length), max_tokens=9)
    bench.submit(one)
    bench.run()
    assert outputs_of(one) == continuation(prompt(length), 9)


def test_unfinished_chunks_end_at_block_borders():
    bench = Bench(max_batch_tokens=10)
    one = sequence(prompt(21), max_tokens=1)
    bench.submit(one)
    bench.run()
    assert [(start, n) for batch in bench.runner.batches for _, start, n in batch] == [(0, 8), (8, 8), (16, 5)]


def test_chunk_smaller_than_a_block_still_progresses():
    bench = Bench(block_size=16, max_batch_tokens=5, max_sequences=5)
    one = sequence(prompt(40), max_tokens=2)
    bench.submit(one)
    bench.run()
    assert outputs_of(one) == continuation(prompt(40), 2)


def test_decodes_run_in_every_step_beside_prompt_chunks_and_come_first():
    bench = Bench(num_blocks=200, max_batch_tokens=16)
    short = sequence(prompt(4, 1), max_tokens=20, session="short")
    bench.submit(short)
    bench.step()
    long = sequence(prompt(150, 2), max_tokens=1, session="long")
    bench.submit(long)
    for _ in range(10):
        batch = bench.step()
        assert batch[0][0] == short.sequence_id
        assert batch[1][0] == long.sequence_id
    assert short.num_output_tokens == 11


def test_step_never_exceeds_its_budgets():
    bench = Bench(num_blocks=400, max_batch_tokens=20, max_sequences=3)
    bench.submit(*(sequence(prompt(17, i), max_tokens=12, session=str(i)) for i in range(12)))
    bench.run()
    assert max(sum(n for *_, n in batch) for batch in bench.runner.batches) <= 20
    assert max(map(len, bench.runner.batches)) == 3
    assert len(bench.outputs.finished) == 12


def test_stop_token_ends_a_sequence_and_is_named():
    bench = Bench()
    expected = continuation(prompt(6), 30)
    one = sequence(prompt(6), max_tokens=30)
    one.sampling = SamplingParams(max_tokens=30, temperature=0.0, stop_token_ids=frozenset({expected[4]}))
    bench.submit(one)
    bench.run()
    stop = expected.index(expected[4])
    assert outputs_of(one) == expected[: stop + 1]
    assert (one.finish_reason, one.stop_token_id) == (FinishReason.STOP, expected[4])


def test_end_of_sequence_is_ignored_when_asked():
    expected = continuation(prompt(6), 8)
    bench = Bench(eos_token_ids=frozenset(expected))
    stopped = sequence(prompt(6), max_tokens=8, session="a")
    ignoring = sequence(prompt(6), session="b")
    ignoring.sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    bench.submit(stopped, ignoring)
    bench.run()
    assert (stopped.finish_reason, stopped.num_output_tokens) == (FinishReason.STOP, 1)
    assert (ignoring.finish_reason, outputs_of(ignoring)) == (FinishReason.LENGTH, expected)


# Prefix cache


def test_second_equal_prompt_computes_only_its_tail():
    bench = Bench()
    first, second = sequence(prompt(13), session="a"), sequence(prompt(13), session="b")
    bench.submit(first)
    bench.run()
    bench.submit(second)
    assert bench.step() == [(second.sequence_id, 12, 1)]
    bench.run()
    assert second.num_cached_tokens == 12
    assert outputs_of(second) == outputs_of(first)
    assert (bench.scheduler.prefix_query_tokens, bench.scheduler.prefix_hit_tokens) == (26, 12)


def test_prompt_that_is_cached_whole_still_computes_its_last_block():
    bench = Bench()
    first, second = sequence(prompt(12), session="a"), sequence(prompt(12), session="b")
    bench.submit(first)
    bench.run()
    bench.submit(second)
    assert bench.step() == [(second.sequence_id, 8, 4)]
    bench.run()
    assert outputs_of(second) == outputs_of(first)


def test_generated_tokens_are_reused_in_the_next_turn():
    bench = Bench()
    first = sequence(prompt(6), max_tokens=11)
    bench.submit(first)
    bench.run()
    second = sequence([*first.token_ids, 7, 8], session="next turn")
    bench.submit(second)
    assert bench.step() == [(second.sequence_id, 16, 3)]  # the last token generated had no KV


def test_edited_history_shares_only_what_comes_before_the_edit():
    bench = Bench()
    tokens = prompt(16)
    bench.submit(sequence(tokens, session="a"))
    bench.run()
    edited = tokens.copy()
    edited[5] += 1
    second = sequence(edited, session="b")
    bench.submit(second)
    assert bench.step()[0][1] == 4
    bench.run()
    assert outputs_of(second) == continuation(edited, 8)


# Prefill-only sequences


def test_prefill_only_sequence_reports_progress_and_keeps_its_blocks_until_released():
    bench = Bench(max_batch_tokens=8, max_sequences=2)
    one = sequence(prompt(20), max_tokens=0)
    bench.submit(one)
    sealed = []
    while not one.is_finished:
        bench.step()
        sealed.append(one.num_sealed_blocks)
    assert sealed == [2, 4, 5]
    assert [s.sequence_id for s in bench.outputs.prefilled] == [one.sequence_id] * 3
    assert bench.finished == [(one.sequence_id, "sealed")]
    assert not bench.outputs.tokens
    assert bench.pool.counts().pinned == 5
    assert bench.pool.allocate(60) is None
    bench.scheduler.tables.unpin(one)
    bench.scheduler.tables.unpin(one)
    assert bench.pool.counts().cached == 5


def test_prefill_only_sequence_that_is_cached_whole_finishes_without_a_step():
    bench = Bench()
    first, second = sequence(prompt(20), max_tokens=0, session="a"), sequence(prompt(20), max_tokens=0, session="b")
    bench.submit(first)
    bench.run()
    bench.submit(second)
    batch = bench.scheduler.schedule()
    assert not batch.scheduled
    outputs = bench.scheduler.take_outputs()
    assert outputs.prefilled == outputs.finished == [second]
    assert (second.num_sealed_blocks, second.num_cached_tokens) == (5, 20)


def test_prefill_only_sequence_must_end_at_a_block_border():
    with pytest.raises(InvalidRequest, match=r"21 tokens is no multiple of 4"):
        Bench().submit(sequence(prompt(21), max_tokens=0))


# Siblings


def test_choices_of_one_session_compute_their_prompt_once():
    bench = Bench()
    choices = [sequence(prompt(22), max_tokens=5, choice=i) for i in range(4)]
    bench.submit(*choices)
    bench.run()
    prefills = [(n, start) for batch in bench.runner.batches for _, start, n in batch if n > 1]
    assert prefills == [(22, 0)]  # the others copy the last block's first token and compute the second
    assert {tuple(outputs_of(c)) for c in choices} == {tuple(continuation(prompt(22), 5))}


def test_choices_wait_for_a_first_one_that_still_acquires_kv():
    bench = Bench()
    first, second = sequence(prompt(9), acquiring=True), sequence(prompt(9), choice=1)
    bench.submit(first, second)
    assert bench.step() == []
    assert bench.fetch(first, 2)
    assert bench.step() == [(second.sequence_id, 8, 1)]


def test_next_choice_leads_when_the_first_is_aborted():
    bench = Bench(max_batch_tokens=8, max_sequences=4)
    choices = [sequence(prompt(22), max_tokens=3, choice=i) for i in range(3)]
    bench.submit(*choices)
    bench.step()
    bench.scheduler.abort([choices[0].sequence_id])
    bench.run()
    assert [r for _, r in bench.finished] == ["aborted", "length", "length"]
    assert bench.pool.counts().used == 0


# Memory pressure


def test_blocks_are_taken_only_for_tokens_about_to_be_computed():
    bench = Bench(max_batch_tokens=8)
    one = sequence(prompt(30), max_tokens=100)
    bench.submit(one)
    bench.step()
    assert len(one.block_table) == 2


def test_preempted_sequences_resume_with_the_same_tokens():
    bench = Bench(num_blocks=12)
    sequences = [sequence(prompt(8, i), max_tokens=30, session=str(i)) for i in range(4)]
    bench.submit(*sequences)
    bench.run()
    assert bench.scheduler.preemption.count > 0
    for i, one in enumerate(sequences):
        assert outputs_of(one) == continuation(prompt(8, i), 30)
    assert bench.pool.counts().used == 0


def test_cheapest_sequence_yields_first():
    bench = Bench(num_blocks=9, max_batch_tokens=32)
    long, short = (
        sequence(prompt(16, 1), max_tokens=15, session="l"),
        sequence(prompt(8, 2), max_tokens=15, session="s"),
    )
    bench.submit(long, short)
    while not bench.scheduler.preemption.count:
        bench.step()
    assert short.status is SequenceStatus.WAITING
    assert long.status is SequenceStatus.RUNNING


def test_less_important_sequence_yields_first():
    bench = Bench(num_blocks=9, max_batch_tokens=32)
    long = sequence(prompt(16, 1), max_tokens=15, session="l", priority=1)
    short = sequence(prompt(8, 2), max_tokens=15, session="s", priority=0)
    bench.submit(long, short)
    while not bench.scheduler.preemption.count:
        bench.step()
    assert long.status is SequenceStatus.WAITING


def test_lone_sequence_fills_the_whole_pool():
    bench = Bench(num_blocks=8)
    one = sequence(prompt(20), max_tokens=13)  # 32 tokens have KV
    bench.submit(one)
    bench.run()
    assert outputs_of(one) == continuation(prompt(20), 13)
    assert one.num_preemptions == 0


def test_lone_sequence_that_peers_leave_no_block_waits_and_keeps_its_kv():
    bench = Bench(num_blocks=4)
    donor = sequence(prompt(8, 1), max_tokens=0, session="donor")
    bench.submit(donor)
    bench.run()
    one = sequence(prompt(8, 2), max_tokens=3, session="one")
    bench.submit(one)
    bench.step()
    assert bench.step() == []
    assert one.status is SequenceStatus.RUNNING
    bench.scheduler.tables.unpin(donor)
    bench.run()
    assert outputs_of(one) == continuation(prompt(8, 2), 3)
    assert one.num_preemptions == 0


def test_sequences_that_could_never_run_are_refused_with_both_numbers():
    bench = Bench(num_blocks=8, max_model_len=100)
    with pytest.raises(CapacityExceeded, match=r"33 tokens need 9 KV blocks of 4 tokens, the worker has 8"):
        bench.submit(sequence(prompt(20), max_tokens=14))
    with pytest.raises(CapacityExceeded, match=r"9 KV blocks .* has 8"):
        bench.submit(sequence(prompt(36), max_tokens=0))
    with pytest.raises(ContextLengthExceeded, match=r"101 tokens, the context length is 100"):
        bench.submit(sequence(prompt(101), max_tokens=1))
    with pytest.raises(ContextLengthExceeded, match=r"20 tokens and max_tokens 81 make 101, .* 100"):
        bench.submit(sequence(prompt(20), max_tokens=81))
    with pytest.raises(InvalidRequest, match="no tokens"):
        bench.submit(sequence([], max_tokens=1))
    with pytest.raises(InvalidRequest, match="samples no tokens"):
        Bench(role="prefill").submit(sequence(prompt(4), max_tokens=1))


def test_configuration_without_a_token_per_sequence_is_refused():
    with pytest.raises(ConfigurationError, match=r"max_sequences 9 exceeds max_batch_tokens 8"):
        Bench(max_batch_tokens=8, max_sequences=9)


# Order and fairness


def test_sequence_that_does_not_fit_does_not_block_those_behind_it():
    bench = Bench(num_blocks=16)
    running = sequence(prompt(24, 1), max_tokens=20, session="running")
    big = sequence(prompt(56, 2), max_tokens=2, session="big")
    small = sequence(prompt(4, 3), max_tokens=2, session="small")
    bench.submit(running)
    bench.step()
    bench.submit(big, small)
    bench.step()
    assert (big.status, small.status) == (SequenceStatus.WAITING, SequenceStatus.RUNNING)
    bench.run()
    assert outputs_of(big) == continuation(prompt(56, 2), 2)


def test_big_sequence_is_not_starved_by_a_stream_of_small_ones():
    bench = Bench(num_blocks=16, max_overtakes=10)
    bench.submit(*(sequence(prompt(16, i), max_tokens=8, session=f"first {i}") for i in range(2)))
    bench.step()
    big = sequence(prompt(60, 9), max_tokens=2, session="big")
    bench.submit(big)
    num_small = 0
    while big.status is not SequenceStatus.FINISHED:
        bench.submit(sequence(prompt(16, 100 + num_small), max_tokens=8, session=f"small {num_small}"))
        num_small += 1
        bench.step()
        assert num_small < 200
    started_before = [s for s in bench.outputs.finished if s.session_id.startswith("small")]
    assert len(started_before) <= 12


def test_higher_priority_starts_first_but_ages_nobody_out():
    bench = Bench(max_sequences=1, max_overtakes=5)
    low = sequence(prompt(4, 1), max_tokens=1, session="low", priority=9, arrival_s=0.0)
    bench.submit(low)
    for i in range(20):
        bench.submit(sequence(prompt(4, 2 + i), max_tokens=1, session=f"high {i}", arrival_s=1.0 + i))
    bench.run()
    order = [s.session_id for s in bench.outputs.finished]
    assert order.index("low") == 5


def test_shortest_prefill_first_orders_by_tokens_to_compute():
    bench = Bench(max_sequences=1, policy=ShortestPrefillFirst())
    bench.submit(*(sequence(prompt(n, n), max_tokens=1, session=str(n)) for n in (30, 10, 20)))
    bench.run()
    assert [s.session_id for s in bench.outputs.finished] == ["10", "20", "30"]


# Abort


def test_abort_frees_blocks_at_once_between_steps():
    bench = Bench()
    running, waiting = sequence(prompt(9, 1), session="r"), sequence(prompt(9, 2), session="w", acquiring=True)
    bench.submit(running, waiting)
    bench.step()
    assert bench.fetch(waiting, 1)
    bench.scheduler.abort([running.sequence_id, waiting.sequence_id, running.sequence_id])
    bench.scheduler.abort([running.sequence_id])
    bench.check()
    assert bench.pool.counts().used == 0
    bench.run()
    assert bench.finished == [(running.sequence_id, "aborted"), (waiting.sequence_id, "aborted")]


@pytest.mark.parametrize("num_steps_before", range(5))
def test_abort_during_the_step_in_flight_takes_effect_after_it(num_steps_before):
    bench = Bench(max_batch_tokens=8)
    one = sequence(prompt(14), max_tokens=3)  # prefill, prefill, decode, decode
    bench.submit(one)
    for _ in range(num_steps_before):
        bench.step()
    num_tokens = len(bench.outputs.tokens)
    batch = bench.scheduler.schedule()
    bench.scheduler.abort([one.sequence_id])
    bench.scheduler.abort([one.sequence_id])
    if batch.scheduled:
        assert bench.pool.counts().used > 0
        bench.check()
    result = bench.runner.execute(batch)
    outputs = bench.scheduler.update(batch, result)
    assert not outputs.tokens
    assert len(bench.outputs.finished) + len(outputs.finished) == 1
    assert len(bench.outputs.tokens) == num_tokens
    assert bench.pool.counts().used == 0


def test_abort_of_a_running_sequence_that_is_not_in_the_step_frees_at_once():
    bench = Bench(max_batch_tokens=8)
    first, second = sequence(prompt(30, 1), session="a"), sequence(prompt(30, 2), session="b")
    bench.submit(first, second)
    batch = bench.scheduler.schedule()
    assert [e.sequence for e in batch.scheduled] == [first]
    bench.scheduler.abort([second.sequence_id])
    assert second.is_finished
    assert bench.scheduler.take_outputs().finished == [second]
