"""Between tenants: whoever was served least starts next, and who runs more than its share steps aside."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.engine.fair_share import CREDIT_TOKENS, MAX_STEPS_ASIDE
from shared.engine.sequence import FinishReason
from tests.engine.fake_runner import Bench, continuation, prompt, sequence

HOGS = 50


def hog(bench, count=HOGS, length=12, max_tokens=60):
    bench.submit(*(sequence(prompt(length, 1000 + i), max_tokens, session=f"h{i}", tenant="hog") for i in range(count)))


def steps_to_first_token(bench, one, limit=400):
    for number in range(1, limit):
        bench.step()
        if one.num_output_tokens:
            return number
    raise AssertionError("starved")


@pytest.mark.parametrize("slots", [4, 64])
def test_a_victims_first_token_comes_as_soon_as_if_the_hog_were_not_there(slots):
    quiet = Bench(num_blocks=2000, max_sequences=slots, max_batch_tokens=64)
    alone = sequence(prompt(100, 7), 4, tenant="victim")
    quiet.submit(alone)
    expected = steps_to_first_token(quiet, alone)
    bench = Bench(num_blocks=2000, max_sequences=slots, max_batch_tokens=64)
    hog(bench)
    for _ in range(30):
        bench.step()
    victim = sequence(prompt(100, 7), 4, tenant="victim", session="v")
    bench.submit(victim)
    assert steps_to_first_token(bench, victim) <= expected + 1
    bench.run()
    assert victim.token_ids[100:] == continuation(prompt(100, 7), 4)


def test_a_hog_that_holds_all_blocks_makes_way():
    bench = Bench(num_blocks=64, max_sequences=8, max_batch_tokens=64, block_size=4)
    hog(bench, count=8, length=16, max_tokens=100)
    for _ in range(16):
        bench.step()
    victim = sequence(prompt(40, 7), 4, tenant="victim", session="v")
    bench.submit(victim)
    assert steps_to_first_token(bench, victim) <= 4
    bench.run()
    assert len(bench.outputs.finished) == 9


def test_the_hog_goes_on_while_victims_come_without_end():
    bench = Bench(num_blocks=2000, max_sequences=16, max_batch_tokens=32)
    hog(bench, count=10, max_tokens=30)
    for number in range(400):
        bench.submit(sequence(prompt(24, number), 2, tenant="victim", session=f"v{number}"))
        bench.step()
    done = [one for one in bench.outputs.finished if one.tenant == "hog"]
    assert len(done) == 10
    bench.run()


def test_backlogged_tenants_are_served_alike():
    bench = Bench(num_blocks=4000, max_sequences=4, max_batch_tokens=32)
    for number in range(40):
        bench.submit(sequence(prompt(24, number), 16, tenant="short", session=f"s{number}"))
        bench.submit(sequence(prompt(24, 500 + number), 48, tenant="long", session=f"l{number}"))
    for _ in range(300):
        bench.step()
    share = bench.scheduler._share
    assert 0.8 < share.served("short") / share.served("long") < 1.25


def test_a_single_tenant_is_scheduled_as_ever():
    plain, named = Bench(), Bench()
    for bench, tenant in ((plain, ""), (named, "acme")):
        for number in range(12):
            bench.submit(sequence(prompt(17, number), 12, session=str(number), tenant=tenant))
        bench.run()
    shape = [[(start, n) for _, start, n in batch] for batch in plain.runner.batches]
    assert shape == [[(start, n) for _, start, n in batch] for batch in named.runner.batches]


def test_nobody_saves_up_a_claim_by_being_away():
    bench = Bench(num_blocks=4000, max_sequences=8, max_batch_tokens=64)
    hog(bench, count=8, max_tokens=300)
    early = sequence(prompt(8, 1), 2, tenant="late", session="early")
    bench.submit(early)
    for _ in range(200):
        bench.step()
    share = bench.scheduler._share
    bench.submit(sequence(prompt(8, 2), 2, tenant="late", session="again"))
    assert share.served("late") == share.served("hog")
    assert CREDIT_TOKENS
    assert MAX_STEPS_ASIDE


@settings(max_examples=30, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 60), st.integers(1, 20), st.integers(0, 3)), max_size=40
    ),
    slots=st.integers(1, 8),
)
def test_whatever_comes_everything_ends_with_its_own_tokens(arrivals, slots):
    bench = Bench(num_blocks=48, max_sequences=slots, max_batch_tokens=16)
    ones = []
    for number, (tenant, length, max_tokens, pause) in enumerate(arrivals):
        ones.append(sequence(prompt(length, number), max_tokens, tenant=tenant, session=str(number)))
        bench.submit(ones[-1])
        for _ in range(pause):
            bench.step()
    bench.run()
    assert all(one.finish_reason is FinishReason.LENGTH for one in ones)
    for number, one in enumerate(ones):
        assert one.token_ids[one.num_prompt_tokens :] == continuation(
            prompt(one.num_prompt_tokens, number), one.num_output_tokens
        )
