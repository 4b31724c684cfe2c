"""Experience corrects the model, and is forgotten where nothing renews it."""

from dataclasses import replace

import pytest

from services.gateway.sessions.placement import Mode, Prompt, Snapshot, place
from services.gateway.sessions.placement_learning import HALF_LIFE_S, MAX_OVERHEAD_S, PlacementLearning
from tests.services.gateway.conftest import FakeWorker


@pytest.fixture
def record():
    worker = FakeWorker().record
    return replace(worker, load=replace(worker.load, prefill_tokens_per_s=1000.0, transfer_bytes_per_s=1e9))


def snapshot(record, **fields):
    prefill = replace(record, worker_id="prefill-0", role="prefill", incarnation="p")
    return Snapshot(decode_workers=[record], prefill_workers=[prefill], **fields)


def test_what_the_model_misses_is_added_to_its_next_prediction(record):
    learning = PlacementLearning(lambda: 0.0)
    first = place(Prompt(100), snapshot(record), "remote")
    for _ in range(50):
        learning.observe(first, first.predicted_s + 0.25)
    again = place(Prompt(100), snapshot(record, overhead_s=learning.overheads()), "remote")
    assert again.predicted_s == pytest.approx(first.predicted_s + 0.25)
    assert again.overhead_s == pytest.approx(0.25)
    learning.observe(again, again.predicted_s)
    assert learning.overheads()[Mode.REMOTE_PREFILL] == pytest.approx(0.25)


def test_a_dear_mode_is_avoided_and_tried_again_later(record):
    now_s = [0.0]
    learning = PlacementLearning(lambda: now_s[0])
    busy = replace(record, load=replace(record.load, running=4))
    choose = lambda: place(Prompt(100), snapshot(busy, overhead_s=learning.overheads()), "auto")  # noqa: E731
    assert choose().mode is Mode.REMOTE_PREFILL
    learning.observe(choose(), 30.0)
    assert learning.overheads()[Mode.REMOTE_PREFILL] == MAX_OVERHEAD_S
    assert choose().mode is Mode.LOCAL
    now_s[0] = 5 * HALF_LIFE_S
    assert choose().mode is Mode.REMOTE_PREFILL
