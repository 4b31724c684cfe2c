"""Choosing a backend, and the matrix multiplication that comes with it."""

import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from kernels import backend as backend_module
from kernels.backend import load_backend
from kernels.cpu.build import COMPILERS, NativeUnavailableError
from kernels.cpu_torch import packed_linear as packed_linear_module
from kernels.cpu_torch.packed_linear import packed_linear, packing_works
from kernels.dense_linear import DenseLinear
from kernels.quantization import Quantization, quantize_weight
from kernels.reference import quantized_linear

CPU = torch.device("cpu")


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
def test_auto_is_the_native_backend_where_it_can_be_built():
    chosen = load_backend("auto", CPU)
    assert chosen.name == "native"
    assert chosen.numerics.startswith("native-")
    assert load_backend("auto", CPU, torch.float16).name == "cpu"
    quantized = load_backend("auto", CPU, torch.float32, Quantization.INT4)
    assert quantized.numerics == f"{chosen.numerics}-int4"


def test_auto_is_the_torch_backend_without_a_compiler_and_native_says_why(monkeypatch):
    def unavailable():
        raise NativeUnavailableError("no C++ compiler found")

    monkeypatch.setattr(backend_module, "default_library", unavailable)
    assert load_backend("auto", CPU).name == "cpu"
    with pytest.raises(ValueError, match="no C\\+\\+ compiler found"):
        load_backend("native", CPU)


def test_unknown_backend_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown kernel backend 'metal'; known: auto, reference, cpu, native, triton"):
        load_backend("metal", CPU)


def test_cpu_backend_refuses_another_device():
    with pytest.raises(ValueError, match="cannot run on device cuda"):
        load_backend("cpu", torch.device("cuda"))


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.INT4])
def test_quantized_products_of_the_torch_backends_are_the_reference_and_differ_in_numerics(quantization):
    weight, x = torch.randn(40, 70), torch.randn(3, 70)
    chosen = load_backend("cpu", CPU, torch.float32, quantization)
    assert chosen.numerics == f"torch-{quantization.value}"
    expected = quantized_linear(x, quantize_weight(weight, quantization), None)
    assert chosen.linear(weight, None)(x).equal(expected)
    assert chosen.head(weight, None)(x).equal(quantized_linear(x, quantize_weight(weight, Quantization.INT8), None))


def test_triton_refuses_quantization_and_says_what_has_it():
    with pytest.raises(ValueError, match="quantization int8 needs backend native, cpu or reference, on a CPU"):
        load_backend("triton", torch.device("cuda"), torch.bfloat16, Quantization.INT8)


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
