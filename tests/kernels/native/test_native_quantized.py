"""Quantized matrix products: the definition itself, and the native kernels against it on every instruction set here."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from kernels import reference
from kernels.cpu.build import COMPILERS, supported_isas
from kernels.cpu.library import Library
from kernels.cpu.packed_linear import native_linear
from kernels.quantization import GROUP, Quantization, quantize_weight

SCHEMES = [Quantization.INT8, Quantization.INT4]
SENTINEL = -77.0
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")


@pytest.fixture(scope="module", params=supported_isas(), ids=lambda isa: isa.name)
def library(request):
    return Library(request.param, 2)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(("scheme", "bound"), [(Quantization.INT8, 0.01), (Quantization.INT4, 0.1)])
def test_quantized_weight_is_near_the_original(scheme, bound):
    weight = randn(33, 130)
    quantized = quantize_weight(weight, scheme)
    scales = quantized.scales if scheme is Quantization.INT4 else quantized.scales[:, None]
    restored = quantized.codes * scales.repeat_interleave(GROUP, 1)[:, :130] if scales.shape[1] > 1 else (
        quantized.codes * scales
    )  # fmt: skip
    assert relative_error(restored, weight) < bound
    assert quantized.scales.bfloat16().float().equal(quantized.scales) == (scheme is Quantization.INT4)


@pytest.mark.parametrize(("scheme", "bound"), [(Quantization.INT8, 0.015), (Quantization.INT4, 0.13)])
def test_quantized_product_is_near_the_exact_one_and_an_outlier_stays_in_its_group(scheme, bound):
    weight, x = randn(70, 200), randn(5, 200, seed=1)
    x[2, 7] = 1000.0
    actual = reference.quantized_linear(x, quantize_weight(weight, scheme), None)
    weight[:, 7] = 0
    calm = reference.quantized_linear(x[:, GROUP:], quantize_weight(weight[:, GROUP:], scheme), None)
    assert relative_error(actual[[0, 1, 3, 4]], F.linear(x, randn(70, 200))[[0, 1, 3, 4]]) < bound
    assert relative_error(calm, F.linear(x[:, GROUP:], weight[:, GROUP:])) < bound


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_quantize_to_zeros(scheme):
    quantized = quantize_weight(torch.zeros(3, 65), scheme)
    assert not quantized.codes.any()
    assert not quantized.scales.any()
    assert not reference.quantized_linear(torch.zeros(2, 65), quantized, None).any()


@needs_compiler
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (31, 7), (33, 64), (97, 129), (64, 320), (70, 711)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_native_product_equals_reference_and_a_row_does_not_depend_on_its_batch(
    library, scheme, outputs, inputs, with_bias
):
    weight, x = randn(outputs, inputs, seed=1), randn(203, inputs, seed=3) * 3
    x[5] = 0
    bias = randn(outputs, seed=2) if with_bias else None
    linear = native_linear(library, scheme, weight, bias)
    whole = linear.multiply(x)
    expected = reference.quantized_linear(x, quantize_weight(weight, scheme), bias)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-4)
    for begin, end in [(0, 1), (1, 3), (3, 6), (2, 6), (1, 6), (5, 22), (3, 67), (100, 203)]:
        assert linear.multiply(x[begin:end]).equal(whole[begin:end])
    out = torch.full((5, outputs), SENTINEL)
    library.calls.tandem_multiply(library.team, linear.handle, x.data_ptr(), None, 0.0, 3, out.data_ptr())
    assert out[:3].equal(whole[:3])
    assert bool((out[3:] == SENTINEL).all())


@needs_compiler
@pytest.mark.parametrize("scheme", SCHEMES)
def test_extreme_codes_do_not_saturate(library, scheme):
    """All products at their largest, same sign: where 16-bit partial sums would overflow."""
    weight, x = torch.full((32, 256), -1.0), torch.ones(9, 256)
    weight[:, ::7] = 0.5
    x[:, ::3] = -1.0
    expected = reference.quantized_linear(x, quantize_weight(weight, scheme), None)
    torch.testing.assert_close(native_linear(library, scheme, weight, None).multiply(x), expected)
    same = torch.full((32, 256), -1.0)
    expected = reference.quantized_linear(same, quantize_weight(same, scheme), None)
    torch.testing.assert_close(native_linear(library, scheme, same, None).multiply(same), expected)


@needs_compiler
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_rounding_is_the_specified_one_to_the_bit(library, scheme, dtype):
    """Every code and scale, read out of the product with rows of the unit matrix, whose codes are 127 or 0."""
    weight = randn(45, 130, seed=4).to(dtype)
    weight[3] = 0
    weight[4, 64:128] = 0
    product = native_linear(library, scheme, weight, None).multiply(torch.eye(130))
    expected = reference.quantized_linear(torch.eye(130), quantize_weight(weight, scheme), None)
    torch.testing.assert_close(product, expected, rtol=3e-7, atol=0)
