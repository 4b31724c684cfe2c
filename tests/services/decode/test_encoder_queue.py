"""The queue of an encoder's worker: batches, order, refusals, what a failure leaves."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest
import torch

from services.decode.encoder.queue import EncoderPooling, EncoderQueue
from shared.errors import Overloaded, WorkerLost


class FakeEncoder:
    """States tell the token; waits for leave."""

    def __init__(self):
        self.batches = []
        self.leave = threading.Event()

    def forward(self, inputs):
        self.batches.append(inputs)
        assert self.leave.wait(10)
        if inputs == [[13]]:
            raise ArithmeticError("unlucky")
        return [torch.tensor([[float(token)] for token in ids]) for ids in inputs]


@contextlib.asynccontextmanager
async def running(encoder, **limits):
    queue = EncoderQueue(encoder, **{"max_batch_tokens": 6, "max_sequences": 3, "max_waiting": 8, **limits})
    work = asyncio.create_task(queue.run())
    try:
        yield queue
    finally:
        encoder.leave.set()
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        queue.close()


async def test_batches_are_bounded_and_the_urgent_come_first():
    encoder = FakeEncoder()
    async with running(encoder) as queue:
        first = asyncio.create_task(queue.encode([[1]], EncoderPooling.CLS, 0))
        while not encoder.batches:
            await asyncio.sleep(0.01)
        second = asyncio.create_task(queue.encode([[2] * 9, [3, 5], [4] * 3, [6, 6]], EncoderPooling.MEAN, 1))
        third = asyncio.create_task(queue.encode([[7, 8]], EncoderPooling.CLS, 0))
        await asyncio.sleep(0)
        assert queue.stats().waiting == 5
        encoder.leave.set()
        assert [v.tolist() for v in await second] == [[2.0], [4.0], [4.0], [6.0]]
        assert [v.tolist() for v in await first + await third] == [[1.0], [7.0]]
        await queue.until_idle()
        assert (queue.is_idle, queue.stats().steps) == (True, 5)
    assert encoder.batches == [[[1]], [[7, 8]], [[2] * 9], [[3, 5], [4] * 3], [[6, 6]]]


async def test_too_many_are_refused_and_the_cancelled_are_not_computed():
    encoder = FakeEncoder()
    async with running(encoder) as queue:
        first = asyncio.create_task(queue.encode([[1]], EncoderPooling.CLS, 0))
        while not encoder.batches:
            await asyncio.sleep(0.01)
        second = asyncio.create_task(queue.encode([[2]] * 8, EncoderPooling.CLS, 0))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="8 inputs wait, 1 more"):
            await queue.encode([[3]], EncoderPooling.CLS, 0)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert queue.stats().waiting == 0
        encoder.leave.set()
        await first
    assert encoder.batches == [[[1]]]


async def test_a_failure_of_the_model_is_told_to_everybody():
    encoder = FakeEncoder()
    encoder.leave.set()
    async with running(encoder) as queue:
        with pytest.raises(WorkerLost, match="unlucky"):
            await queue.encode([[13]], EncoderPooling.CLS, 0)
        with pytest.raises(WorkerLost, match="unlucky"):
            await queue.encode([[1]], EncoderPooling.CLS, 0)
        assert queue.stats().failure == "unlucky"
        await queue.until_idle()
