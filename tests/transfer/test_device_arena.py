"""What device arenas refuse where there is no device, and what is asked of blocks wherever they are."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from protos import kv_transfer_pb2 as pb
from shared.device_arena import DeviceArena, open_device
from shared.errors import ConfigurationError
from shared.transfer.checksum import block_checksum, block_checksums, copy_block, is_contiguous
from shared.transfer.ucx import is_staged, ucx_options

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def test_a_handle_of_another_length_is_refused_with_both_lengths():
    with pytest.raises(ConfigurationError, match=r"64 bytes, this one 3"):
        DeviceArena.open(b"abc", 0, 4, 1024, pb.ChecksumKernels())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_device_says_so():
    pytest.importorskip("cuda.bindings", reason="cuda.bindings is not installed")
    with pytest.raises(ConfigurationError, match="CUDA"):
        open_device()


def test_the_cuda_preset_opens_cudas_transports_beside_tcp():
    assert set(ucx_options("cuda", "lo")["TLS"].split(",")) == {"tcp", "self", "cuda_copy", "cuda_ipc"}


@pytest.mark.parametrize(
    ("tls", "peer", "expected"),
    [
        ("cuda", "10.0.0.7", False),  # this host
        ("cuda", "127.0.0.1", False),
        ("cuda", "10.0.0.8", True),
        ("tcp", "10.0.0.8", False),
    ],
)
def test_device_memory_is_staged_on_its_way_to_another_host_only(tls, peer, expected):
    assert is_staged(tls, peer, ["127.0.0.1", "10.0.0.7"]) is expected


def test_host_blocks_are_copied_as_ever():
    source, target = np.arange(64, dtype=np.uint8), np.zeros(64, dtype=np.uint8)
    copy_block(source, target)
    assert block_checksum(target) == block_checksum(source)
    assert is_contiguous(target)
    assert not is_contiguous(np.arange(64, dtype=np.uint8)[::2])


@needs_gpu
def test_a_device_block_has_the_checksum_of_its_bytes_and_survives_a_stay_on_the_host():
    from shared.worker.checksum_kernels import checksum_kernels

    memory = torch.randint(0, 256, (4, 1 << 16), dtype=torch.uint8, device="cuda")
    arena = DeviceArena.export(memory.data_ptr(), 4, 1 << 16, checksum_kernels(1 << 16))
    host = np.zeros(1 << 16, dtype=np.uint8)
    copy_block(arena.blocks[2], host)
    assert host.tolist() == memory[2].tolist()
    assert block_checksum(arena.blocks[2]) == block_checksum(host)
    assert block_checksums([arena.blocks[2], host, *arena.blocks]) == [
        block_checksum(block.cpu().numpy()) for block in (memory[2], memory[2], *memory)
    ]
    copy_block(host, arena.blocks[0])
    assert torch.equal(memory[0], memory[2])


@needs_gpu
def test_an_arena_cut_out_of_a_larger_allocation_is_found_where_it_lies():
    from shared.worker.checksum_kernels import checksum_kernels

    pair = [torch.full((4, 4096), value, dtype=torch.uint8, device="cuda") for value in (1, 2)]
    kernels = checksum_kernels(4096)
    first, second = (DeviceArena.export(memory.data_ptr(), 4, 4096, kernels) for memory in pair)
    assert first.handle == second.handle
    assert second.offset - first.offset == pair[1].data_ptr() - pair[0].data_ptr()
    torch.cuda.synchronize()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(_sum_of_block, second.handle, second.offset, kernels.SerializeToString()).result(timeout=60)
    assert found == 2 * 4096


def _sum_of_block(handle: bytes, offset: int, kernels: bytes) -> int:
    open_device()
    arena = DeviceArena.open(handle, offset, 4, 4096, pb.ChecksumKernels.FromString(kernels))
    host = np.zeros(4096, dtype=np.uint8)
    copy_block(arena.blocks[3], host)
    return int(host.sum())
