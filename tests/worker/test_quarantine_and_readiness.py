"""Quarantined slots are bounded: beyond a quarter of the pool the worker says that it is not ready, and why."""

from types import SimpleNamespace

from shared.engine.block_pool import BlockPool
from shared.engine.config import EngineConfig
from shared.engine.engine import Engine
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence, SequenceStatus
from shared.identity import namespace_hash
from shared.worker.status import WorkerStatus


class NoRunner:
    def execute(self, batch):
        raise AssertionError


def test_too_many_quarantined_slots_are_a_reason_until_they_are_released():
    engine = Engine(NoRunner(), BlockPool(32, 4), EngineConfig(block_size=4, max_model_len=256), lambda outputs: None)
    link = SimpleNamespace(is_attached=True, incarnation="t", bytes_per_s=0.0)
    status = WorkerStatus(SimpleNamespace(role="decode"), engine, link)
    sequence = Sequence(
        session_id="s",
        token_ids=list(range(40)),
        num_prompt_tokens=40,
        sampling=SamplingParams(max_tokens=4),
        namespace=namespace_hash("fp"),
        status=SequenceStatus.WAITING_FOR_KV,
    )
    engine.submit([sequence])
    slots = engine.reserve(sequence, 9)
    engine.quarantine(slots[:8])
    assert status.readiness() == (True, "")
    engine.quarantine(slots[8:])
    assert status.readiness() == (False, "9 blocks quarantined (limit 8)")
    assert engine.stats().blocks.quarantined == 9
    engine.release_quarantined(slots)
    assert status.readiness() == (True, "")
    engine.check_integrity()
