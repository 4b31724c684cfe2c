"""An engine that ends on its own says so first, so that nobody is told that a transfer is over."""

import asyncio

import numpy as np
import pytest

from shared.errors import ConfigurationError, TandemError
from shared.transfer.listen_filter import interface_addresses
from shared.transfer.transport import TransportError
from shared.transfer.ucx import UcxTransport, listen_choice, ucx_options

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
    (engine,) = transport._engines

    def defect():
        raise ZeroDivisionError

    engine.command(defect, engine.new_future())
    await asyncio.wait_for(waiting, 30)
    assert story == ["engine failed", "operation failed"]
    with pytest.raises(TransportError):
        await endpoint.send(b"x")
    await peer.stop()


async def test_the_failure_of_any_lane_is_the_transports():
    failed = asyncio.Event()
    transport = UcxTransport("shm", "127.0.0.1", 0, on_failure=lambda error: failed.set())
    await transport.start(lambda endpoint: None)

    def defect():
        raise ZeroDivisionError

    last = transport._engines[-1]
    last.command(defect, last.new_future())
    await asyncio.wait_for(failed.wait(), 30)
    with pytest.raises(TransportError):
        await transport.probe()


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
    assert listen_choice("tcp", "127.0.0.1", "") == ("lo", ["127.0.0.1"])
    assert listen_choice("rc,tcp,self", "localhost", "") == ("lo", ["127.0.0.1"])
    assert ucx_options("shm", "lo")["NET_DEVICES"] == "lo"
    assert "NET_DEVICES" not in ucx_options("tcp", "")


def test_the_address_that_is_served_chooses_the_device_and_everything_chooses_none():
    own = {name: address for name, address in interface_addresses().items() if name != "lo"}
    for name, address in own.items():
        assert listen_choice("tcp", address, "") == (name, [address])
        assert listen_choice("rc,tcp,self", address, "") == ("", [address])
        assert listen_choice("tcp", "127.0.0.1", f"lo,{name}") == (f"lo,{name}", ["127.0.0.1", address])
    for host in ("0.0.0.0", "192.0.2.250", "no-such-host.invalid"):
        assert listen_choice("tcp", host, "") == ("", [])
    with pytest.raises(ConfigurationError, match=r"no IPv4 address on interface wlan7; known: .*lo"):
        listen_choice("tcp", "127.0.0.1", "wlan7")


@pytest.mark.parametrize("admits_all", [True, False])
async def test_ucx_is_reached_at_its_address_only_and_by_admitted_hosts_only(admits_all):
    transport = UcxTransport(
        "tcp", "127.0.0.1", 0, on_failure=lambda error: pytest.fail("called"), admits_all=admits_all
    )
    await transport.start(lambda endpoint: None)

    async def reaches(to="127.0.0.1", source="127.0.0.1"):
        try:
            async with asyncio.timeout(0.3):
                _, writer = await asyncio.open_connection(to, transport.port, local_addr=(source, 0))
        except TimeoutError:
            return False
        writer.close()
        return True

    assert await reaches() is admits_all
    assert not await reaches(to="127.0.0.2")
    transport.admit("127.0.0.1")
    assert await reaches()
    assert await reaches(source="127.0.0.9") is admits_all
    await transport.stop()
    with pytest.raises(ConnectionRefusedError):
        await reaches()


def test_a_ucx_transport_list_is_taken_as_it_is():
    assert ucx_options("rc,tcp,self", "")["TLS"] == "rc,tcp,self"


def test_transport_errors_stay_inside_the_transfer():
    assert not issubclass(TransportError, TandemError)
