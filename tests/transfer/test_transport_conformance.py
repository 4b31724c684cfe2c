"""What every transport must do; the block protocol above it relies on nothing else."""

import asyncio
import contextlib

import numpy as np
import pytest

from shared.transfer.loopback import LoopbackNetwork, LoopbackTransport
from shared.transfer.protocol import new_tag_base
from shared.transfer.transport import TransportError
from shared.transfer.ucx import UcxTransport

pytestmark = pytest.mark.timeout(60)


def engine_failed(error: BaseException) -> None:
    raise AssertionError("the engine failed") from error


class Pair:
    """Two transports, and connections from the first to the second."""

    def __init__(self, client, server):
        self.client, self.server = client, server
        self.accepted = asyncio.Queue()

    async def start(self):
        await self.client.start(lambda endpoint: None)
        await self.server.start(self.accepted.put_nowait)

    async def connect(self, lane=0):
        near = await self.client.connect("127.0.0.1", self.server.port, lane=lane)
        await near.send(b"hello")
        far = await asyncio.wait_for(self.accepted.get(), 30)
        assert await asyncio.wait_for(far.receive(5), 30) == b"hello"
        return near, far


@pytest.fixture(params=["loopback", "ucx:tcp", "ucx:shm"])
async def pair(request):
    if request.param == "loopback":
        network = LoopbackNetwork()
        client, server = LoopbackTransport(network), LoopbackTransport(network)
    else:
        tls = request.param.removeprefix("ucx:")
        client, server = (UcxTransport(tls, "127.0.0.1", 0, on_failure=engine_failed) for _ in range(2))
    pair = Pair(client, server)
    await pair.start()
    yield pair
    await pair.client.stop()
    await pair.server.stop()


def random_blocks(num_blocks, block_bytes):
    return np.random.default_rng(0).integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8)


@pytest.mark.parametrize(("num_blocks", "block_bytes"), [(1, 1), (3, 1000), (40, 24 << 10), (5, 2 << 20)])
async def test_blocks_land_in_the_memory_posted_for_their_tag(pair, num_blocks, block_bytes):
    near, far = await pair.connect()
    source, target = random_blocks(num_blocks, block_bytes), np.zeros((num_blocks, block_bytes), np.uint8)
    order = list(reversed(range(num_blocks)))
    base = new_tag_base()
    arriving = near.receive_blocks([target[i] for i in order], base)
    await near.send(b"go")
    assert await far.receive(2) == b"go"
    await far.send_blocks([source[i] for i in order], base)
    await arriving
    assert (source == target).all()


async def test_lanes_bring_blocks_at_the_same_time_and_do_not_mix_them(pair):
    lanes = range(pair.client.lanes)
    ends = [await pair.connect(lane) for lane in lanes]
    source, targets = random_blocks(8, 2 << 20), [np.zeros((8, 2 << 20), np.uint8) for _ in lanes]
    arriving = [
        near.receive_blocks(list(target), lane << 16)
        for (near, _), target, lane in zip(ends, targets, lanes, strict=True)
    ]
    await asyncio.gather(
        *(far.send_blocks(list(source), lane << 16) for (_, far), lane in zip(ends, lanes, strict=True))
    )
    await asyncio.gather(*arriving)
    assert all((source == target).all() for target in targets)


async def test_a_request_finds_its_memory_in_place_and_what_follows_the_blocks_is_the_result(pair):
    near, far = await pair.connect()
    source, target = random_blocks(3, 300_000), np.zeros((3, 300_000), np.uint8)
    base = new_tag_base()
    ending = near.receive_blocks(list(target), base, request=b"three", last_bytes=4)
    assert await far.receive(5) == b"three"
    lasts = []

    def last():
        lasts.append(b"last")
        return lasts[-1]

    await far.send_blocks(list(source), base, last)
    assert await ending == b"last"
    assert (source == target).all()
    assert len(lasts) == 1


async def test_a_peer_that_goes_before_the_last_word_fails_the_whole(pair):
    near, far = await pair.connect()
    source, target = random_blocks(3, 300_000), np.zeros((3, 300_000), np.uint8)
    base = new_tag_base()
    ending = near.receive_blocks(list(target), base, request=b"three", last_bytes=4)
    assert await far.receive(5) == b"three"
    await far.send_blocks(list(source), base)
    await far.close()
    with pytest.raises(TransportError):
        await asyncio.wait_for(ending, 30)
    await near.close()


async def test_no_last_word_is_made_for_blocks_that_were_not_taken(pair):
    near, far = await pair.connect()
    source = random_blocks(2, 2 << 20)
    sending = far.send_blocks(list(source), new_tag_base(), lambda: pytest.fail("nobody took the blocks"))
    await asyncio.sleep(0.1)
    await far.close()
    with pytest.raises(TransportError):
        await asyncio.wait_for(sending, 30)
    await near.close()


async def test_arrivals_are_told_in_order_and_each_with_its_bytes_in_place(pair):
    near, far = await pair.connect()
    source, target = random_blocks(12, 2 << 20), np.zeros((12, 2 << 20), np.uint8)
    told = []

    def on_arrival(index):
        told.append((index, bool((source[index] == target[index]).all())))

    base = new_tag_base()
    arriving = near.receive_blocks(list(target), base, on_arrival)
    await near.send(b"go")
    assert await far.receive(2) == b"go"
    await far.send_blocks(list(source[:5]), base)
    assert not arriving.done()
    await far.send_blocks(list(source[5:]), base + 5)
    await arriving
    assert told == [(index, True) for index in range(12)]


async def test_a_small_transfer_does_not_wait_for_a_large_one(pair):
    """Whoever carries both gives the small one its turn."""
    if pair.client.name == "ucx:tcp":
        pytest.skip("what a socket has is taken before anybody hears of it")
    near, far = await pair.connect()
    other_near, other_far = await pair.connect()
    large, small = random_blocks(64, 2 << 20), random_blocks(1, 1000)
    large_target, small_target = np.zeros_like(large), np.zeros_like(small)
    times = 8  # over and over, to last longer than a busy machine takes to come to the small one
    bases, order = (new_tag_base(), new_tag_base()), []
    await asyncio.gather(
        near.receive_blocks(list(large_target) * times, bases[0], lambda index: order.append(f"large {index}")),
        far.send_blocks(list(large) * times, bases[0]),
        other_near.receive_blocks(list(small_target), bases[1], lambda index: order.append("small")),
        other_far.send_blocks(list(small), bases[1]),
    )
    assert order.index("small") < order.index(f"large {len(large) * times - 1}")
    assert (small == small_target).all()


async def test_streams_carry_bytes_in_order_both_ways(pair):
    near, far = await pair.connect()
    payload = bytes(range(256)) * 200
    reading = asyncio.gather(far.receive(100), far.receive(len(payload) - 100))
    await near.send(payload)
    assert b"".join(await reading) == payload
    await far.send(b"thanks")
    assert await near.receive(6) == b"thanks"


async def test_transfers_with_their_own_tags_do_not_mix(pair):
    pairs = [await pair.connect() for _ in range(4)]
    blocks = random_blocks(4 * 8, 50_000).reshape(4, 8, 50_000)
    targets = np.zeros_like(blocks)

    async def transfer(i):
        near, far = pairs[i]
        base = new_tag_base()
        arriving = near.receive_blocks(list(targets[i]), base)
        await far.send_blocks(list(blocks[i]), base)
        await arriving

    await asyncio.gather(*(transfer(i) for i in range(4)))
    assert (blocks == targets).all()


async def test_close_ends_waiting_operations_on_both_sides(pair):
    near, far = await pair.connect()
    target = np.zeros((2, 1 << 20), np.uint8)
    waiting = [near.receive_blocks(list(target), new_tag_base()), near.receive(10), far.receive(10)]
    await asyncio.sleep(0.05)
    await near.close()
    for operation in waiting:
        with pytest.raises(TransportError):
            await asyncio.wait_for(operation, 30)
    assert not near.is_open
    await far.close()


async def test_nothing_is_written_after_close(pair):
    """The rule that makes slots reusable: a receive that is closed in mid-flight leaves the memory alone."""
    for delay_s in (0.0, 0.001, 0.003):
        near, far = await pair.connect()
        source, target = random_blocks(16, 4 << 20), np.zeros((16, 4 << 20), np.uint8)
        base = new_tag_base()
        arriving = near.receive_blocks(list(target), base)
        sending = far.send_blocks(list(source), base)
        await asyncio.sleep(delay_s)
        await near.close()
        target[:] = 0
        with contextlib.suppress(TransportError):
            await asyncio.wait_for(sending, 30)
        with contextlib.suppress(TransportError):
            await arriving
        await asyncio.sleep(0.05)
        assert not target.any()
        await far.close()


async def test_operations_on_a_closed_endpoint_fail(pair):
    near, far = await pair.connect()
    await near.close()
    await near.close()
    for operation in (near.send(b"x"), near.receive(1), near.receive_blocks([np.zeros(8, np.uint8)], 0)):
        with pytest.raises(TransportError):
            await asyncio.wait_for(operation, 30)
    await far.close()


async def test_a_dead_address_is_an_error_at_first_use(pair):
    dead = pair.server.port
    await pair.server.stop()

    async def speak():
        endpoint = await pair.client.connect("127.0.0.1", dead)
        try:
            await endpoint.send(b"hello")
            await endpoint.receive(1)
        finally:
            await endpoint.close()

    with pytest.raises(TransportError):
        await asyncio.wait_for(speak(), 30)


async def test_stop_ends_everything_and_close_still_returns(pair):
    near, far = await pair.connect()
    waiting = far.receive(10)
    await pair.server.stop()
    with pytest.raises(TransportError):
        await asyncio.wait_for(waiting, 30)
    await asyncio.wait_for(far.close(), 30)
    with pytest.raises(TransportError):
        await asyncio.wait_for(near.receive(1), 30)
    await asyncio.wait_for(near.close(), 30)
