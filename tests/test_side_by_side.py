"""Two processes of tests: end-to-end files in one, the rest in the other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEST = """
import os
from pathlib import Path

import pytest


@pytest.mark.parametrize("number", range({count}))
def test_it(number):
    (Path(os.environ["RAN_IN"]) / f"{name}-{{number}}").write_text(os.environ["PYTEST_XDIST_WORKER"])
    assert number != {fails}
"""


def run(folder: Path, files: dict[str, str]) -> tuple[int, str, dict[str, list[str]]]:
    """Writes tests and runs them as `make test` does: exit status, what was printed, and in what process each ran."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "ran-in").mkdir()
    plugins = ["-p", "xdist", "-p", "tests.side_by_side", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # most of them take long to load
    environment |= {"RAN_IN": str(folder / "ran-in"), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "pytest", *plugins, "--import-mode=importlib", "--numprocesses", "2", "tests"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)
    ran_in: dict[str, list[str]] = {}
    for file in sorted((folder / "ran-in").iterdir()):
        ran_in.setdefault(file.name.rpartition("-")[0], []).append(file.read_text())
    return result.returncode, result.stdout + result.stderr, ran_in


def text_of(name: str, count: int = 8, *, fails: int = -1) -> str:
    return TEST.format(name=name, count=count, fails=fails)


def test_end_to_end_files_share_a_process_and_others_run_beside_them(tmp_path):
    files = {f"tests/e2e/test_{name}.py": text_of(name) for name in ("left", "right")}
    files |= {f"tests/unit/test_{name}.py": text_of(name, 12) for name in ("a", "b")}
    status, printed, ran_in = run(tmp_path, files)
    assert status == 0, printed
    assert "40 passed" in printed
    assert {name: len(processes) for name, processes in ran_in.items()} == {"left": 8, "right": 8, "a": 12, "b": 12}
    end_to_end = {*ran_in["left"], *ran_in["right"]}
    assert len(end_to_end) == 1
    assert {*ran_in["a"], *ran_in["b"]} - end_to_end


def test_one_failure_in_any_process_fails_the_run_and_is_named(tmp_path):
    files = {"tests/e2e/test_e.py": text_of("e"), "tests/unit/test_u.py": text_of("u", fails=3)}
    status, printed, _ = run(tmp_path, files)
    assert status == 1
    assert "FAILED tests/unit/test_u.py::test_it[3]" in printed
    assert "1 failed, 15 passed" in printed
