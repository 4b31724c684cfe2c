"""The age of the oldest pin."""

from shared.engine.pins import Pins


def test_the_oldest_pin_is_that_of_the_block_pinned_longest_without_a_break():
    now_s = 10.0
    pins = Pins(3, lambda: now_s)
    assert pins.oldest_age_s == 0.0
    pins.add(0)
    now_s = 11.0
    pins.add(1)
    pins.add(0)
    pins.remove(0)
    now_s = 13.0
    assert pins.oldest_age_s == 3.0  # one pin of block 0 is left
    pins.remove(0)
    assert pins.oldest_age_s == 2.0
    pins.add(0)
    assert pins.oldest_age_s == 2.0
    pins.remove(1)
    assert pins.oldest_age_s == 0.0
    assert pins.counts == [1, 0, 0]
