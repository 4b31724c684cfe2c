"""A data plane that stops turning is noticed, said, and in the end cured; a slow one is left alone."""

import asyncio
import threading

import pytest

from services.kv_transfer.data_plane_watch import DataPlaneWatch, WedgedDataPlane
from shared.transfer.ucx import UcxTransport


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def test_silence_is_said_then_ends_the_process_and_an_answer_in_time_changes_nothing():
    gate, deaths = asyncio.Event(), []
    watch = DataPlaneWatch(gate.wait, deaths.append, interval_s=0.01, late_s=0.15, wedged_s=0.8)
    running = asyncio.create_task(watch.run())
    assert watch.reason == ""
    await until(lambda: watch.reason)
    assert "has not answered for 0." in watch.reason
    gate.set()
    await until(lambda: not watch.reason)
    gate.clear()
    await until(lambda: deaths)
    assert isinstance(deaths[0], WedgedDataPlane)
    await running


async def test_a_thread_that_never_sleeps_ends_the_process_and_one_that_sleeps_again_does_not():
    awake_s, deaths = iter([0.0, 0.4, 0.9, 0.0, 0.9, 1.1]), []

    async def answer():
        pass

    watch = DataPlaneWatch(answer, deaths.append, lambda: next(awake_s), interval_s=0.001, spinning_s=1.0)
    async with asyncio.timeout(30):
        await watch.run()
    assert "has not slept for 1.1 s" in str(deaths[0])
    assert next(awake_s, None) is None


@pytest.mark.timeout(60)
async def test_a_ucx_thread_that_hangs_does_not_answer_its_probe():
    transport = UcxTransport("tcp", "127.0.0.1", 0, on_failure=lambda error: pytest.fail("called"))
    await transport.start(lambda endpoint: None)
    async with asyncio.timeout(30):
        await transport.probe()
    release, engine = threading.Event(), transport._engines[0]
    engine.command(lambda: release.wait(10), engine.new_future())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await transport.probe()
    release.set()
    async with asyncio.timeout(30):
        await transport.probe()
    await transport.stop()
