"""What a Prefill call tells its caller, who waits for each block it asked for."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from services.prefill.servicer import PrefillServicer
from shared.engine.sequence import FinishReason, Sequence, SequenceStatus
from shared.engine.step import StepOutputs
from shared.errors import WorkerDraining, WorkerLost
from shared.identity import BlockHash, SessionId

BLOCK_SIZE = 4


def make_servicer() -> PrefillServicer:
    identity = SimpleNamespace(worker_id="prefill-0", block_size=BLOCK_SIZE)
    dispatch = SimpleNamespace(add_listener=lambda listener: None)
    return PrefillServicer(SimpleNamespace(engine=None, dispatch=dispatch, status=SimpleNamespace(identity=identity)))


def make_sequence(num_blocks: int) -> Sequence:
    return Sequence(
        session_id=SessionId("s"),
        token_ids=list(range(num_blocks * BLOCK_SIZE)),
        num_prompt_tokens=num_blocks * BLOCK_SIZE,
        sampling=None,
        namespace=BlockHash(b"n"),
    )


async def test_last_block_is_told_when_it_is_sealed_while_the_one_before_is_on_its_way():
    servicer, sequence, changed = make_servicer(), make_sequence(num_blocks=2), asyncio.Event()
    told = []
    sequence.num_sealed_blocks = 1
    async for progress in servicer._follow(sequence, changed):
        told.append(progress.sealed_blocks)
        # The caller takes its time with the first message; meanwhile a step computes the rest.
        sequence.num_sealed_blocks = 2
        sequence.status, sequence.finish_reason = SequenceStatus.FINISHED, FinishReason.SEALED
        servicer._changed[sequence.sequence_id] = changed
        servicer._on_step(StepOutputs(prefilled=[sequence], finished=[sequence]))
    assert told == [1, 2]


@pytest.mark.parametrize(("is_draining", "error"), [(True, WorkerDraining), (False, WorkerLost)])
async def test_a_prompt_that_is_handed_back_says_why(is_draining, error):
    servicer, sequence, changed = make_servicer(), make_sequence(num_blocks=2), asyncio.Event()
    servicer._parts.status.is_draining = is_draining
    servicer._changed[sequence.sequence_id] = changed
    assert servicer.hand_back() == 1
    with pytest.raises(error, match="prefill-0"):
        await anext(progress async for progress in servicer._follow(sequence, changed) if progress.sealed_blocks)
