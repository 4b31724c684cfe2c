"""Values that are tallied show in the histogram as if it had observed them one by one."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram

from shared.metrics.tally import FLUSH_EVERY_S, Tally

BOUNDS = (0.01, 0.1, 1.0)
VALUES = [0.0, 0.01, 0.010001, 0.05, 0.1, 0.7, 1.0, 1.5, 80.0, -0.5]


def histogram(name):
    registry = CollectorRegistry()
    return registry, Histogram(name, "what", ("model_name",), buckets=BOUNDS, registry=registry).labels("m")


def samples(registry):
    return {
        (sample.name, sample.labels.get("le")): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


def test_flushed_tally_equals_observing_each_value():
    told, direct = histogram("seconds")
    for value in VALUES:
        direct.observe(value)
    tallied, child = histogram("seconds")
    tally = Tally(child, BOUNDS)
    for value in VALUES:
        tally.observe(value, now_s=5.0)
    tally.flush()
    assert samples(tallied) == samples(told)


def test_nothing_is_told_twice():
    registry, child = histogram("seconds")
    tally = Tally(child, BOUNDS)
    tally.observe(0.5, now_s=5.0)
    tally.flush()
    tally.flush()
    assert samples(registry)["seconds_count", None] == 1


def test_values_are_told_without_a_flush_once_a_second_has_passed():
    registry, child = histogram("seconds")
    tally = Tally(child, BOUNDS)
    tally.observe(0.5, now_s=5.0)
    tally.observe(0.5, now_s=5.0)
    tally.observe(0.5, now_s=5.0 + FLUSH_EVERY_S)
    assert samples(registry)["seconds_count", None] == 3
