"""The measure of what a prefill elsewhere costs the sequences that decode here."""

import pytest

from shared.engine.neighbour_slowdown import NeighbourSlowdown


def observe(slowdown, num_steps, seconds, *, is_beside, num_sequences=4):
    for _ in range(num_steps):
        slowdown.observe(seconds, num_sequences, is_beside=is_beside)


def test_is_1_until_steps_of_both_kinds_were_seen():
    slowdown = NeighbourSlowdown(lambda: 0.0)
    observe(slowdown, 100, 0.2, is_beside=True)
    assert slowdown.factor == 1
    observe(slowdown, 100, 0.1, is_beside=False)
    assert slowdown.factor == 1
    observe(slowdown, 100, 0.2, is_beside=True)
    assert slowdown.factor == pytest.approx(2)


def test_compares_steps_of_as_many_sequences():
    slowdown = NeighbourSlowdown(lambda: 0.0)
    for num_sequences in (1, 10):
        observe(slowdown, 50, 0.01 * num_sequences, is_beside=False, num_sequences=num_sequences)
    observe(slowdown, 50, 0.1, is_beside=True, num_sequences=10)
    assert slowdown.factor == pytest.approx(1)
    observe(slowdown, 50, 9.9, is_beside=True, num_sequences=11)  # nothing to compare them with
    assert slowdown.factor == pytest.approx(1)


def test_follows_a_machine_that_got_quiet():
    slowdown = NeighbourSlowdown(lambda: 0.0)
    observe(slowdown, 50, 0.1, is_beside=False)
    observe(slowdown, 500, 0.3, is_beside=True)
    assert slowdown.factor == pytest.approx(3)
    observe(slowdown, 2000, 0.1, is_beside=True)
    assert slowdown.factor == pytest.approx(1, abs=0.01)


def test_a_neighbour_that_seems_to_help_costs_nothing():
    slowdown = NeighbourSlowdown(lambda: 0.0)
    observe(slowdown, 50, 0.2, is_beside=False)
    observe(slowdown, 50, 0.1, is_beside=True)
    assert slowdown.factor == 1


def test_is_forgotten_where_nothing_renews_it():
    now_s = [0.0]
    slowdown = NeighbourSlowdown(lambda: now_s[0])
    observe(slowdown, 50, 0.1, is_beside=False)
    observe(slowdown, 50, 0.3, is_beside=True)
    now_s[0] = 60.0
    assert slowdown.factor == pytest.approx(2)
    now_s[0] = 1200.0
    assert slowdown.factor == pytest.approx(1, abs=0.01)
