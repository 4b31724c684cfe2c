"""Counting prefixes over bitmaps, without Redis."""

import random

from hypothesis import given
from hypothesis import strategies as st

from shared.directory.breaker import CircuitBreaker
from shared.directory.hints import PrefixCount


def bitmap(holders):
    """The bytes that SETBIT would have made."""
    if not holders:
        return None
    raw = bytearray(max(holders) // 8 + 1)
    for index in holders:
        raw[index // 8] |= 0x80 >> index % 8
    return bytes(raw)


def lengths(bitmaps):
    count = PrefixCount()
    count.extend(bitmaps)
    return count.finish()


def test_the_example_of_the_module():
    assert lengths([bitmap({0, 2}), bitmap({0, 2}), bitmap({2}), None]) == {0: 2, 2: 3}


def test_no_blocks_no_holders():
    assert lengths([]) == {}
    assert lengths([None, bitmap({1})]) == {}
    assert lengths([b"\x00\x00", bitmap({1})]) == {}


def test_bitmaps_of_different_lengths_compare_by_index():
    assert lengths([bitmap({1, 9, 4095}), bitmap({9, 4095}), bitmap({9})]) == {1: 1, 4095: 2, 9: 3}


@given(
    st.lists(st.frozensets(st.integers(0, 40), max_size=6), max_size=12),
    st.integers(0, 12),
)
def test_equals_the_obvious_count_however_it_is_cut(blocks, cut):
    expected = {}
    for holder in range(41):
        has = [holder in holders for holders in blocks]
        num_blocks = [*has, False].index(False)
        if num_blocks:
            expected[holder] = num_blocks
    count = PrefixCount()
    count.extend([bitmap(holders) for holders in blocks[:cut]])
    count.extend([bitmap(holders) for holders in blocks[cut:]])
    assert count.finish() == expected


def test_counting_is_over_when_no_holder_is_left():
    count = PrefixCount()
    count.extend([bitmap({3})])
    assert not count.is_over
    count.extend([bitmap({4})])
    assert count.is_over


def test_breaker_opens_on_a_failure_and_closes_on_a_success_after_its_time():
    now = [0.0]
    breaker = CircuitBreaker(open_s=1.0, clock=lambda: now[0])
    assert not breaker.is_open
    assert breaker.failed()
    assert breaker.is_open
    now[0] = 0.5
    assert not breaker.succeeded()
    assert not breaker.failed()  # was open already; its second begins anew
    now[0] = 1.2
    assert breaker.is_open
    assert not breaker.succeeded()
    now[0] = 1.5
    assert breaker.succeeded()
    assert not breaker.is_open


def test_a_slow_redis_that_answers_the_probes_costs_one_time_out_a_second():
    now, spent = [0.0], 0
    breaker = CircuitBreaker(open_s=1.0, clock=lambda: now[0])
    rng = random.Random(1)
    while now[0] < 30:
        now[0] += rng.uniform(0.01, 0.1)
        if rng.random() < 0.3:
            breaker.succeeded()  # a background probe with a patient time-out
        elif not breaker.is_open:
            spent += 1
            breaker.failed()
    assert spent <= 30
