"""Instruction sets that this machine lacks are compiled at least; running them needs the processor."""

import platform
import shutil
import subprocess
import sys

import pytest
import torch

from kernels.cpu.build import COMPILERS, FLAGS, SOURCE, Isa, supported_isas
from kernels.cpu.library import Library
from kernels.cpu.packed_linear import native_linear
from kernels.quantization import Quantization

COMPILER = next(filter(None, map(shutil.which, COMPILERS)), None)
X86 = [isa for isa in Isa if isa is not Isa.NEON_DOT]


def compile_only(folder, command, *flags):
    quick = [flag for flag in FLAGS if flag not in ("-O3", "-shared")]
    arguments = [*command, *quick, "-O0", *flags, "-S", "-o", "library.out", SOURCE / "library.cpp"]
    subprocess.run(arguments, check=True, timeout=300, capture_output=True, text=True, cwd=folder)


@pytest.mark.skipif(COMPILER is None or platform.machine() != "x86_64", reason="no C++ compiler for x86-64")
@pytest.mark.parametrize("isa", X86, ids=lambda isa: isa.name)
def test_sources_compile_for_every_instruction_set_of_x86(tmp_path, isa):
    if isa in supported_isas():
        pytest.skip(f"{isa.name} runs here: the other tests compile it and prove its results")
    compile_only(tmp_path, [COMPILER], *isa.flags)


def test_sources_compile_for_arm(tmp_path):
    """With another compiler than `test_native_arm`, which runs them; compile only."""
    pytest.importorskip("ziglang", reason="no cross compiler: pip install ziglang")
    command = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu", "-mcpu=baseline+dotprod"]
    compile_only(
        tmp_path, command, "-emit-llvm"
    )  # every intrinsic is checked by then; without optimization the rest takes long


def test_best_instruction_set_comes_first_and_the_portable_one_always():
    assert supported_isas()[-1] is Isa.GENERIC
    assert supported_isas() == sorted(supported_isas(), key=list(Isa).index)


@pytest.mark.skipif(Isa.AMX not in supported_isas(), reason="this processor has no AMX")
@pytest.mark.parametrize("inputs", [32, 64, 576])
def test_amx_adds_in_the_documented_order(inputs):
    """Per tile of 16 pairs: even and odd products apart, then both together to the sum, each rounded to float32."""
    weight, x = torch.randn(64, inputs).bfloat16(), torch.randn(40, inputs).bfloat16()
    actual = native_linear(Library(Isa.AMX, 1), Quantization.NONE, weight, None).multiply(x.float())
    expected = torch.zeros(40, 64)
    for tile in (x.float()[:, None, :] * weight.float()[None]).split(32, -1):  # products are exact
        even, odd = torch.zeros(40, 64), torch.zeros(40, 64)
        for k in range(0, 32, 2):
            even, odd = even + tile[..., k], odd + tile[..., k + 1]
        expected = expected + (even + odd)
    assert actual.equal(expected)
