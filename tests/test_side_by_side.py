"""Two processes of tests: end-to-end files in one, the rest in the other, and some tests with nobody beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TEST = """
import json, os, time
from pathlib import Path

import pytest


@pytest.mark.parametrize("number", range({count}))
{mark}
def test_it(number):
    began_s = time.monotonic()
    time.sleep(0.05)
    span = os.environ["PYTEST_XDIST_WORKER"], began_s, time.monotonic()
    (Path(os.environ["SPANS"]) / f"{name}-{{number}}").write_text(json.dumps(span))
    assert number != {fails}
"""


class Span(NamedTuple):
    process: str
    began_s: float
    ended_s: float


def run(folder: Path, files: dict[str, str]) -> tuple[int, str, dict[str, list[Span]]]:
    """Writes tests and runs them as `make test` does: exit status, what was printed, and when each ran, by file."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    alone: nobody beside it\n")
    (folder / "spans").mkdir()
    plugins = ["-p", "xdist", "-p", "tests.side_by_side", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # most of them take long to load
    environment |= {"SPANS": str(folder / "spans"), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "pytest", *plugins, "--import-mode=importlib", "--numprocesses", "2", "tests"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)
    spans: dict[str, list[Span]] = {}
    for file in sorted((folder / "spans").iterdir()):
        spans.setdefault(file.name.rpartition("-")[0], []).append(Span(*json.loads(file.read_text())))
    return result.returncode, result.stdout + result.stderr, spans


def text_of(name: str, count: int = 8, *, mark: str = "", fails: int = -1) -> str:
    return TEST.format(name=name, count=count, mark=mark, fails=fails)


def overlap(one: Span, other: Span) -> bool:
    return one.began_s < other.ended_s and other.began_s < one.ended_s


def test_end_to_end_files_share_a_process_and_others_run_beside_them(tmp_path):
    files = {f"tests/e2e/test_{name}.py": text_of(name) for name in ("left", "right")}
    files |= {f"tests/unit/test_{name}.py": text_of(name, 12) for name in ("a", "b")}
    status, printed, spans = run(tmp_path, files)
    assert status == 0, printed
    assert "40 passed" in printed
    assert {name: len(ran) for name, ran in spans.items()} == {"left": 8, "right": 8, "a": 12, "b": 12}
    end_to_end = {span.process for span in spans["left"] + spans["right"]}
    assert len(end_to_end) == 1
    assert {span.process for span in spans["a"] + spans["b"]} - end_to_end


def test_a_test_that_is_alone_overlaps_no_other(tmp_path):
    files = {
        "tests/e2e/test_timed.py": text_of("timed", mark="@pytest.mark.alone"),
        **{f"tests/unit/test_{name}.py": text_of(name, 10) for name in ("a", "b")},
    }
    status, printed, spans = run(tmp_path, files)
    assert status == 0, printed
    others = spans["a"] + spans["b"]
    assert len({span.process for span in spans["timed"] + others}) == 2
    assert not any(overlap(timed, other) for timed in spans["timed"] for other in others)


def test_one_failure_in_any_process_fails_the_run_and_is_named(tmp_path):
    files = {"tests/e2e/test_e.py": text_of("e"), "tests/unit/test_u.py": text_of("u", fails=3)}
    status, printed, _ = run(tmp_path, files)
    assert status == 1
    assert "FAILED tests/unit/test_u.py::test_it[3]" in printed
    assert "1 failed, 15 passed" in printed
