"""Prebuilt libraries: found by the digest of their sources, without a compiler."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cpu import build, prebuild
from kernels.cpu.build import COMPILERS, Isa, NativeUnavailableError, prebuilt_path

ROOT = Path(__file__).parents[3]


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    return tmp_path / "prebuilt"


def test_a_prebuilt_library_needs_no_compiler(no_compiler):
    path = prebuilt_path(no_compiler, Isa.GENERIC)
    path.parent.mkdir()
    path.write_bytes(b"a library")
    assert build.build(Isa.GENERIC) == path
    with pytest.raises(NativeUnavailableError, match="no C\\+\\+ compiler"):
        build.build(Isa.AVX2)


def test_a_library_of_other_sources_does_not_count(no_compiler, monkeypatch, tmp_path):
    path = prebuilt_path(no_compiler, Isa.GENERIC)
    path.parent.mkdir()
    path.write_bytes(b"a library")
    changed = shutil.copytree(build.SOURCE, tmp_path / "src")
    (changed / "library.cpp").write_text("// another\n")
    monkeypatch.setattr(build, "SOURCE", changed)
    with pytest.raises(NativeUnavailableError):
        build.build(Isa.GENERIC)


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
def test_what_prebuild_writes_is_loaded_where_there_is_no_compiler(no_compiler, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/local/bin:/usr/bin:/bin")
    monkeypatch.setattr(prebuild, "isas_of", lambda machine: [Isa.GENERIC])
    written = prebuild.prebuild(no_compiler)
    assert written == [prebuilt_path(no_compiler, Isa.GENERIC)]
    script = (
        "import sys; from pathlib import Path; from kernels.cpu import build; build.PREBUILT = Path(sys.argv[1]);"
        "from kernels.cpu.library import Library; Library(build.Isa.GENERIC, 2)"
    )
    environment = {"PATH": str(no_compiler), "PYTHONPATH": str(ROOT), "HOME": str(no_compiler)}
    subprocess.run([sys.executable, "-c", script, str(no_compiler)], env=environment, check=True, timeout=120)


@pytest.mark.parametrize(("machine", "expected"), [("x86_64", len(Isa) - 1), ("aarch64", 2), ("riscv64", 1)])
def test_every_instruction_set_of_an_architecture_is_prebuilt(machine, expected):
    isas = prebuild.isas_of(machine)
    assert len(isas) == expected
    assert Isa.GENERIC in isas
