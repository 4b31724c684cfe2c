"""The repaired interpreter itself: a check that cannot fail proves nothing."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.triton.interpreter import MemoryFault

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="about the interpreter itself")


@triton.jit
def shifted_copy(x, y, shift, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i + shift))


@triton.jit
def all_write_one(y):
    tl.store(y, tl.program_id(0))


@triton.jit
def multiply_add(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(y + i, v * v + v)


def raises_fault(launch) -> bool:
    with pytest.raises(Exception) as caught:
        launch()
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, MemoryFault):
        error = error.__cause__
    return error is not None


def test_out_of_bounds_load_is_reported():
    x, y = torch.zeros(16), torch.zeros(16)
    shifted_copy[(1,)](x, y, 0, 16)
    assert raises_fault(lambda: shifted_copy[(1,)](x, y, 1, 16))


def test_two_writers_of_one_address_are_reported():
    assert raises_fault(lambda: all_write_one[(2,)](torch.zeros(1, dtype=torch.int32)))


def test_bf16_arithmetic_rounds_to_nearest_even():
    x, y = torch.randn(16).bfloat16(), torch.zeros(16).bfloat16()
    multiply_add[(1,)](x, y, 16)
    assert torch.equal(y, x * x + x)
