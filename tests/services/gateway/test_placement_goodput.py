"""What the cost model is for: on a simulated cluster no simpler policy serves more requests well."""

import json
from pathlib import Path

import pytest

from tests.services.gateway.simulated_cluster import (
    BENCH,
    FASTER_SHARED_CORES,
    LONG_DOCUMENTS,
    POLICIES,
    TWO_SHARED_CORES,
    Speeds,
    goodput,
)

NOISE = 0.97
"""Two policies that place a few requests of a trace differently are equal within this."""

MEASURED = Path("loadtest/results/zen3-placement.json")


@pytest.mark.parametrize("rate", [3.0, 8.0])
@pytest.mark.parametrize(
    "speeds",
    [
        pytest.param(Speeds(), id="as measured"),
        pytest.param(Speeds(remote_s=0.08), id="a slow way between the workers"),
        pytest.param(Speeds(prefill_rate=6000.0, decode_s=0.0005), id="fast prefill"),
        pytest.param(Speeds(heartbeat_s=3.0), id="heartbeats that are long past"),
        pytest.param(Speeds(beside=1.4), id="cores that are partly shared"),
    ],
)
def test_the_cost_model_is_best_or_equal(speeds, rate):
    good = {policy: goodput(policy, speeds, rate, seconds=40.0, seeds=2) for policy in POLICIES}
    assert good["cost model"] >= NOISE * max(good.values()), good


def test_where_decoding_is_the_scarce_thing_it_is_best_or_equal_too():
    good = {policy: goodput(policy, Speeds(decode_s=0.003), 5.0, seconds=40.0, seeds=2) for policy in POLICIES}
    assert good["cost model"] >= max(good.values()), good


@pytest.mark.parametrize("lengths", [pytest.param(BENCH, id="bench"), pytest.param(LONG_DOCUMENTS, id="long")])
@pytest.mark.parametrize(
    ("speeds", "rate"),
    [(FASTER_SHARED_CORES, rate) for rate in (3.0, 5.0, 7.0)] + [(TWO_SHARED_CORES, rate) for rate in (2.0, 4.0, 6.0)],
)
def test_it_is_best_or_equal_where_both_workers_share_the_cores(speeds, rate, lengths):
    good = {policy: goodput(policy, speeds, rate, seconds=40.0, seeds=3, lengths=lengths) for policy in POLICIES}
    assert good["cost model"] >= NOISE * max(good.values()), good


@pytest.mark.parametrize("policy", POLICIES)
def test_the_simulated_shared_cores_serve_as_many_well_as_measured_ones(policy):
    for rate, measured in json.loads(MEASURED.read_text())["rows"][policy].items():
        simulated = goodput(policy, TWO_SHARED_CORES, measured["offered"], lengths=BENCH)
        assert simulated == pytest.approx(measured["goodput"] / measured["offered"], abs=0.08), rate
