"""What the cost model is for: on a simulated cluster no simpler policy serves more requests well."""

import pytest

from tests.services.gateway.simulated_cluster import POLICIES, Speeds, goodput

NOISE = 0.97
"""Two policies that place a few requests of a trace differently are equal within this."""


@pytest.mark.parametrize("rate", [3.0, 8.0])
@pytest.mark.parametrize(
    "speeds",
    [
        pytest.param(Speeds(), id="as measured"),
        pytest.param(Speeds(remote_s=0.08), id="a slow way between the workers"),
        pytest.param(Speeds(prefill_rate=6000.0, decode_s=0.0005), id="fast prefill"),
        pytest.param(Speeds(heartbeat_s=3.0), id="heartbeats that are long past"),
    ],
)
def test_the_cost_model_is_best_or_equal(speeds, rate):
    good = {policy: goodput(policy, speeds, rate, seconds=40.0, seeds=2) for policy in POLICIES}
    assert good["cost model"] >= NOISE * max(good.values()), good


def test_where_decoding_is_the_scarce_thing_it_is_best_or_equal_too():
    good = {policy: goodput(policy, Speeds(decode_s=0.003), 5.0, seconds=40.0, seeds=2) for policy in POLICIES}
    assert good["cost model"] >= max(good.values()), good
