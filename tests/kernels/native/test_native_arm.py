"""The kernels for 64-bit Arm, run under an emulator: every operation gives what plain C++ gives on this processor."""

import shutil
import subprocess
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from kernels.cpu.build import COMPILERS, FLAGS, SOURCE, Isa

COMPILER = next(filter(None, map(shutil.which, COMPILERS)), None)
CROSS_COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
MISSING = [
    package
    for package, found in [
        ("g++", COMPILER),
        ("g++-aarch64-linux-gnu", CROSS_COMPILER),
        ("qemu-user", EMULATOR),
    ]
    if found is None
]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
DRIVER = Path(__file__).with_name("cross_check.cpp")


def results(folder, compiler, *flags, emulator=()):
    quick = [flag for flag in FLAGS if flag not in ("-O3", "-shared")]
    program = folder / "cross_check"
    command = [compiler, *quick, "-O1", *flags, "-static", "-I", SOURCE, "-o", program, DRIVER]
    subprocess.run(command, check=True, timeout=600, capture_output=True, text=True)
    run = subprocess.run([*emulator, program], timeout=600, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()
    values = iter(np.frombuffer(run.stdout, np.float32).tolist())
    return [(tolerance, list(islice(values, int(count)))) for count, tolerance in zip(values, values, strict=False)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return results(tmp_path_factory.mktemp("generic"), COMPILER, *Isa.GENERIC.flags)


@pytest.mark.parametrize("isa", [Isa.NEON_DOT, Isa.GENERIC], ids=lambda isa: isa.name)
def test_every_operation_equals_plain_cpp(tmp_path, expected, isa):
    actual = results(tmp_path, CROSS_COMPILER, *isa.flags, emulator=[EMULATOR])
    assert len(actual) == len(expected) > 40
    for (tolerance, values), (same_tolerance, wanted) in zip(actual, expected, strict=True):
        assert tolerance == same_tolerance
        np.testing.assert_allclose(values, wanted, rtol=tolerance, atol=tolerance)
