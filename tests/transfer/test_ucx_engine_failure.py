"""An engine that ends on its own says so first, so that nobody is told that a transfer is over."""

import asyncio

import numpy as np
import pytest

from shared.errors import TandemError
from shared.transfer.transport import TransportError
from shared.transfer.ucx import UcxTransport, ucx_options

pytestmark = pytest.mark.timeout(60)


async def test_a_defect_in_the_engine_is_reported_before_any_waiting_operation_fails_over():
    story = []
    transport = UcxTransport("tcp", "127.0.0.1", 0, on_failure=lambda error: story.append("engine failed"))
    peer = UcxTransport("tcp", "127.0.0.1", 0, on_failure=lambda error: story.append("peer failed"))
    await peer.start(lambda endpoint: None)
    await transport.start(lambda endpoint: None)
    endpoint = await transport.connect("127.0.0.1", peer.port)

    async def wait_for_blocks():
        with pytest.raises(TransportError):
            await endpoint.receive_blocks([np.zeros(1 << 20, np.uint8)], 0)
        story.append("operation failed")

    waiting = asyncio.create_task(wait_for_blocks())
    await asyncio.sleep(0.05)
    engine = transport._engine

    def defect():
        raise ZeroDivisionError

    engine.command(defect, engine.new_future())
    await asyncio.wait_for(waiting, 10)
    assert story == ["engine failed", "operation failed"]
    with pytest.raises(TransportError):
        await endpoint.send(b"x")
    await peer.stop()


async def test_an_unusable_option_is_an_error_of_start_and_nothing_else():
    transport = UcxTransport("carrier-pigeon", "127.0.0.1", 0, on_failure=lambda error: pytest.fail("called"))
    with pytest.raises(TransportError):
        await transport.start(lambda endpoint: None)
    with pytest.raises(TransportError, match="not started"):
        await transport.connect("127.0.0.1", 1)
    await transport.stop()


async def test_a_taken_port_is_an_error_of_start():
    first = UcxTransport("tcp", "127.0.0.1", 0, on_failure=lambda error: pytest.fail("called"))
    await first.start(lambda endpoint: None)
    second = UcxTransport("tcp", "127.0.0.1", first.port, on_failure=lambda error: pytest.fail("called"))
    with pytest.raises(TransportError):
        await second.start(lambda endpoint: None)
    await first.stop()


def test_a_loopback_address_keeps_bytes_off_the_network():
    assert ucx_options("tcp", "127.0.0.1")["NET_DEVICES"] == "lo"
    assert ucx_options("shm", "localhost")["NET_DEVICES"] == "lo"
    assert "NET_DEVICES" not in ucx_options("tcp", "10.0.0.1")
    assert "NET_DEVICES" not in ucx_options("tcp", "worker-7.cluster.local")


def test_a_ucx_transport_list_is_taken_as_it_is():
    assert ucx_options("rc,tcp,self", "10.0.0.1")["TLS"] == "rc,tcp,self"


def test_transport_errors_stay_inside_the_transfer():
    assert not issubclass(TransportError, TandemError)
