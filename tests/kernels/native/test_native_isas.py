"""Instruction sets that this machine lacks are compiled at least; running them needs the processor."""

import platform
import shutil
import subprocess
import sys

import pytest

from kernels.cpu.build import COMPILERS, FLAGS, SOURCE, Isa, supported_isas

COMPILER = next(filter(None, map(shutil.which, COMPILERS)), None)
X86 = [isa for isa in Isa if isa is not Isa.NEON_DOT]


def compile_only(command, *flags):
    quick = [flag for flag in FLAGS if flag not in ("-O3", "-shared")]
    arguments = [*command, *quick, "-O0", *flags, "-S", "-o", "/dev/null", SOURCE / "library.cpp"]
    subprocess.run(arguments, check=True, timeout=300, capture_output=True, text=True)


@pytest.mark.skipif(COMPILER is None or platform.machine() != "x86_64", reason="no C++ compiler for x86-64")
@pytest.mark.parametrize("isa", X86, ids=lambda isa: isa.name)
def test_sources_compile_for_every_instruction_set_of_x86(isa):
    if isa in supported_isas():
        pytest.skip(f"{isa.name} runs here: the other tests compile it and prove its results")
    compile_only([COMPILER], *isa.value)


@pytest.mark.parametrize("flags", [(), ("-mcpu=baseline+dotprod",)], ids=["NEON", "NEON_DOT"])
def test_sources_compile_for_arm(flags):
    """Compile only: no processor or emulator of this kind is at hand."""
    pytest.importorskip("ziglang", reason="no cross compiler: pip install ziglang")
    compile_only([sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"], *flags)


def test_best_instruction_set_comes_first_and_the_portable_one_always():
    assert supported_isas()[-1] is Isa.GENERIC
    assert supported_isas() == sorted(supported_isas(), key=list(Isa).index)
