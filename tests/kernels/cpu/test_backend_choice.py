"""Choosing a backend, and the matrix multiplication that comes with it."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from kernels.backend import load_backend
from kernels.cpu_torch import packed_linear as packed_linear_module
from kernels.cpu_torch.packed_linear import packed_linear, packing_works
from kernels.dense_linear import DenseLinear

CPU = torch.device("cpu")


def test_auto_is_the_cpu_backend_on_a_cpu():
    assert load_backend("auto", CPU).name == "cpu"


def test_unknown_backend_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown kernel backend 'metal'; known: auto, reference, cpu, triton"):
        load_backend("metal", CPU)


def test_cpu_backend_refuses_another_device():
    with pytest.raises(ValueError, match="cannot run on device cuda"):
        load_backend("cpu", torch.device("cuda"))


def test_importing_kernels_imports_neither_torch_nor_triton():
    code = "import sys, kernels; sys.exit(bool({'torch', 'triton'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 5, 32, 70])
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_linear_multiplies_like_a_dense_one(dtype, rows, with_bias):
    generator = torch.Generator().manual_seed(rows)
    weight, x = torch.randn(51, 96, generator=generator) / 10, torch.randn(rows, 96, generator=generator)
    bias = torch.randn(51, generator=generator) if with_bias else None
    linear = packed_linear(weight.to(dtype), None if bias is None else bias.to(dtype))
    with torch.inference_mode():
        result = linear(x.to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), F.linear(x, weight, bias), rtol=tolerance, atol=tolerance)


def test_packing_falls_back_to_dense_where_the_op_fails(monkeypatch):
    def fails(*_):
        raise RuntimeError("no such op here")

    monkeypatch.setattr(packed_linear_module, "PackedLinear", fails)
    packing_works.cache_clear()
    try:
        assert isinstance(packed_linear(torch.ones(2, 3), None), DenseLinear)
    finally:
        packing_works.cache_clear()
