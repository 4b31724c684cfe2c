"""A few rounds of chaos, always the same ones; `make chaos` runs as many as one likes."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.chaos.__main__ import chaotic_suite, possible_kinds
from tests.chaos.cases import LONG_EVERY, make_cases
from tests.chaos.rounds import Chaos
from tests.e2e.conftest import local_gateway

SEED = 51
ROUNDS = 3


@pytest.mark.timeout(420)
def test_no_fault_brings_a_wrong_token_a_lost_reply_or_a_leak(short_path):
    with possible_kinds() as kinds, chaotic_suite(short_path) as (suite, saboteur):
        chaos = Chaos(suite, saboteur, make_cases(2 * LONG_EVERY), kinds, print)
        with local_gateway(suite) as url:
            asyncio.run(chaos.learn(url))
        asyncio.run(chaos.run(random.Random(SEED), rounds=ROUNDS, streams=8))
        assert not chaos.report.wrong
        assert chaos.report.outcomes["answered"] > chaos.report.requests // 2
