"""The cost rule: fetch what is cheaper than computing it, by measured rates of both."""

import pytest

from shared.worker.fetch_cost import MEMORY_S, FetchCosts, FetchSpeed, HolderClass

MIB = 1 << 20


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def costs(clock):
    """Peers: 10 ms and then 1 GB/s."""
    costs = FetchCosts(clock)
    for size in (MIB, 8 * MIB, 2 * MIB, 32 * MIB) * 3:
        costs.observe(HolderClass.PEER, size, 0.010 + size / 1e9)
    return costs


def worth(costs, num_bytes, num_tokens, rate, kind=HolderClass.PEER):
    return costs.is_worth_fetching(kind, num_bytes=num_bytes, num_tokens=num_tokens, prefill_tokens_per_s=rate)


def test_latency_and_rate_are_told_apart():
    speed = FetchSpeed()
    for size in (MIB, 4 * MIB, 16 * MIB) * 4:
        speed.observe(size, 0.005 + size / 2e9, 0.0)
    assert speed.predict(0) == pytest.approx(0.005, rel=0.01)
    assert speed.predict(1_000_000_000) == pytest.approx(0.505, rel=0.01)


def test_a_slow_computer_fetches_and_a_fast_one_computes(costs):
    assert worth(costs, 8 * MIB, 128, rate=3_000)  # 18 ms against 43
    assert not worth(costs, 8 * MIB, 128, rate=20_000)  # against 6


def test_one_small_block_is_not_worth_the_latency_where_many_are(costs):
    assert not worth(costs, 2 * MIB, 16, rate=2_000)  # 12 ms against 8
    assert worth(costs, 64 * MIB, 512, rate=2_000)  # 77 against 256


def test_what_is_not_known_is_fetched(costs):
    assert worth(costs, 8 * MIB, 16, rate=1e9, kind=HolderClass.OWN_TIER)
    assert worth(costs, 8 * MIB, 16, rate=0.0)


def test_a_class_that_was_too_slow_is_tried_again_after_a_while(costs, clock):
    assert not worth(costs, 8 * MIB, 16, rate=20_000)
    clock.now_s += MEMORY_S + 1
    assert worth(costs, 8 * MIB, 16, rate=20_000)


def test_a_fetch_that_brought_nothing_is_no_measurement(clock):
    costs = FetchCosts(clock)
    for _ in range(10):
        costs.observe(HolderClass.PEER, 0, 9.0)
    assert worth(costs, MIB, 16, rate=1e9)


def test_a_peer_that_became_slow_is_noticed(costs):
    assert worth(costs, 8 * MIB, 128, rate=3_000)
    for _ in range(10):
        costs.observe(HolderClass.PEER, 8 * MIB, 0.5)
    assert not worth(costs, 8 * MIB, 128, rate=3_000)


def test_fetches_of_one_size_predict_that_size_exactly_and_others_within_two():
    speed = FetchSpeed()
    for _ in range(5):
        speed.observe(MIB, 0.01, 0.0)
    assert speed.predict(MIB) == pytest.approx(0.01)
    assert 0.01 < speed.predict(4 * MIB) < 0.04
