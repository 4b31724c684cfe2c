"""Recency and frequency: what is used again stays, whatever passes by."""

import random
from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st

from services.kv_transfer.two_queue import TwoQueue


def always(key):
    return True


def filled(capacity, keys):
    queue = TwoQueue(capacity)
    for key in keys:
        queue.add(key)
    return queue


def test_newcomers_go_first_come_first_gone_unless_they_were_used():
    queue = filled(8, range(8))
    queue.touch(0)
    queue.touch(1)
    assert [queue.evict(always) for _ in range(4)] == [2, 3, 4, 5]
    assert list(queue) == [6, 7, 0, 1]


def test_few_newcomers_are_spared_and_the_longest_unused_frequent_one_goes():
    queue = filled(8, range(8))
    for key in range(6):
        queue.touch(key)
    assert queue.evict(always) == 0
    queue.touch(1)
    assert queue.evict(always) == 2


def test_one_that_comes_back_soon_after_it_went_is_frequent():
    queue = filled(4, range(4))
    assert queue.evict(always) == 0
    queue.add(0)
    for key in range(10, 20):
        queue.evict(always)
        queue.add(key)
    assert 0 in list(queue)


def test_what_may_not_go_is_passed_over_and_none_is_left_to_say():
    queue = filled(4, range(4))
    queue.touch(3)
    assert queue.evict(lambda key: key == 3) == 3
    assert queue.evict(lambda key: False) is None
    assert list(queue) == [0, 1, 2]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("atre"), st.integers(0, 12)), max_size=80))
def test_every_key_is_in_exactly_one_queue_whatever_happens(steps):
    queue, expected = TwoQueue(6), set()
    for step, key in steps:
        if step == "a" and key not in expected:
            queue.add(key)
            expected.add(key)
        elif step == "t" and key in expected:
            queue.touch(key)
        elif step == "r" and key in expected:
            queue.remove(key)
            expected.remove(key)
        elif step == "e" and expected:
            expected.remove(queue.evict(always))
        assert sorted(queue) == sorted(expected)
        assert len(queue) == len(expected)


def chat_trace(scans):
    """Prompts of a few blocks: 40 shared prefixes, popular ones more often, and one-off documents in between."""
    rng = random.Random(1)
    one_off = 0
    for _ in range(3000):
        prefix = min(int(rng.paretovariate(0.8)), 40)
        yield [("prefix", prefix, i) for i in range(8)]
        if scans and rng.random() < 0.4:
            one_off += 1
            yield [("one-off", one_off, i) for i in range(24)]


def hit_ratio(trace, touch, add, evict, held, capacity):
    """Of the shared prefixes' blocks."""
    hits = asked = 0
    for prompt in trace:
        for key in reversed(prompt):
            is_held = key in held
            if key[0] == "prefix":
                asked += 1
                hits += is_held
            if is_held:
                touch(key)
            else:
                if len(held) >= capacity:
                    held.discard(evict())
                add(key)
                held.add(key)
    return hits / asked


def ratios(scans, capacity=200):
    queue = TwoQueue(capacity)
    ours = hit_ratio(chat_trace(scans), queue.touch, queue.add, lambda: queue.evict(always), set(), capacity)
    lru = OrderedDict()
    plain = hit_ratio(
        chat_trace(scans),
        lru.move_to_end,
        lambda key: lru.__setitem__(key, None),
        lambda: lru.popitem(last=False)[0],
        set(),
        capacity,
    )
    return ours, plain


def test_a_scan_of_one_off_prompts_does_not_flush_the_hot_prefixes():
    ours, plain = ratios(scans=True)
    print(f"hit ratio with scans: 2Q {ours:.3f}, least recently used {plain:.3f}")
    assert ours > plain + 0.05


def test_without_scans_nothing_is_lost_against_least_recently_used():
    ours, plain = ratios(scans=False)
    print(f"hit ratio without scans: 2Q {ours:.3f}, least recently used {plain:.3f}")
    assert ours > plain - 0.01
