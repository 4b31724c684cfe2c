"""`/ready` of a worker: busy is ready, hung is not, and the reason says which and by how much (F16, F30, F34)."""

import asyncio
import contextlib
import re
import time
from dataclasses import replace
from unittest.mock import Mock

import pytest

from shared.engine.block_pool import BlockCounts
from shared.engine.stats import EngineStats
from shared.worker.hung import hand_back_when_hung
from shared.worker.status import STALL_S, WorkerIdentity, WorkerStatus

IDENTITY = WorkerIdentity("w0", "decode", "i1", "f", "m", "float32", "cpu", 16, 64, 10, 1)
BLOCKS = {"total": 100, "free": 100, "cached": 0, "used": 0, "pinned": 0, "quarantined": 0}


class StandIn:
    """An engine and a link in whatever state the test wants."""

    is_attached = True
    incarnation = "t1"
    bytes_per_s = 0.0
    quarantined = 0
    fields: dict

    def __init__(self, **fields):
        self.fields = fields

    def stats(self):
        numbers = dict.fromkeys(EngineStats.__slots__, 0)
        stats = EngineStats(**{**numbers, "failure": "", "blocks": None, "last_progress_s": time.monotonic()})
        counts = BlockCounts(**{**dict.fromkeys(BlockCounts.__slots__, 0), **BLOCKS, "quarantined": self.quarantined})
        return replace(stats, blocks=counts, **self.fields)


def status(role="decode", **fields):
    idle_s = fields.pop("idle_s", 0.0)  # taken from now on: a suite may run for long between collecting and testing
    given = {name: value for name, value in fields.items() if name in EngineStats.__slots__}
    stand_in = StandIn(**given, last_progress_s=time.monotonic() - idle_s)
    for name in ("is_attached", "incarnation", "quarantined"):
        if name in fields:
            setattr(stand_in, name, fields[name])
    return WorkerStatus(replace(IDENTITY, role=role), stand_in, stand_in)


def readiness(**fields):
    return status(**fields).readiness()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"running": 64, "waiting": 1000},
        {"idle_s": 3600},  # nothing to do
        {"waiting_for_kv": 5, "idle_s": 3600},  # waits for others, computes nothing
        {"running": 8, "last_step_s": 30.0, "idle_s": 100},  # steps are long here
        {"quarantined": 25},
        {"is_attached": False},  # decode computes what it cannot fetch
    ],
    ids=str,
)
def test_idle_busy_and_slow_are_ready(fields):
    assert readiness(**fields) == (True, "")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"running": 3, "idle_s": STALL_S + 5}, r"no step finished for 1\d\.\d s with 3 sequences"),
        ({"waiting": 2, "last_step_s": 0.1, "idle_s": STALL_S + 5}, r"limit 10\.0 s"),
        ({"running": 1, "last_step_s": 30.0, "idle_s": 200}, r"limit 150\.0 s"),
        ({"quarantined": 26}, r"26 blocks quarantined \(limit 25\)"),
        ({"failure": "RuntimeError: boom"}, "the engine stopped: RuntimeError: boom"),
        ({"is_attached": False, "role": "prefill"}, "kv_transfer is not attached"),
        ({"is_attached": False, "incarnation": None}, "kv_transfer is not attached"),
    ],
    ids=str,
)
def test_hung_leaking_and_cut_off_are_not_and_say_so(fields, reason):
    is_ready, said = readiness(**fields)
    assert not is_ready
    assert re.search(reason, said)


def test_only_a_step_that_does_not_end_makes_a_worker_hung():
    hung = status(running=3, idle_s=STALL_S + 5)
    assert hung.record("127.0.0.1:1", 0.0).hung
    for other in ({"running": 3}, {"idle_s": 3600}, {"quarantined": 26}, {"failure": "RuntimeError: boom"}):
        assert not status(**other).record("127.0.0.1:1", 0.0).hung


async def test_a_hung_prefill_worker_gives_its_prompts_back_again_and_again(monkeypatch):
    monkeypatch.setattr("shared.worker.hung._LOOK_EVERY_S", 0.01)
    servicer = Mock(**{"hand_back.return_value": 1})
    for stand_in, is_given_back in ((status(running=3), False), (status(running=3, idle_s=STALL_S + 5), True)):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(hand_back_when_hung(stand_in, servicer), 0.2)
        assert (servicer.hand_back.call_count > 1) == is_given_back
