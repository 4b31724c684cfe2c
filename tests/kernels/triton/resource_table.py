"""The checked-in tables of what every kernel takes on every target, one per Triton version; comparing with them.

python -m tests.kernels.triton.resource_table            rewrites the table of the installed Triton
python -m tests.kernels.triton.resource_table sm_90      prints one target's rows as JSON
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import triton

from tests.kernels.triton.launches import launches_of
from tests.kernels.triton.offline_compiler import TARGETS, Resources, compiled_for

TABLES = Path(__file__).with_name("resources")
VERSION: str = triton.__version__
Rows = dict[str, Resources]


def compile_target(target: str) -> Rows:
    """Compile every launch for `target`; keys are "launch / kernel"."""
    rows: Rows = {}
    for name, launch in launches_of(target).items():
        with compiled_for(target) as found:
            launch()
        rows |= {f"{name} / {kernel}": resources for kernel, resources in found.items()}
    return rows


def parse(text: str) -> Rows:
    return {name: Resources(**fields) for name, fields in json.loads(text).items()}


def render(rows: Rows) -> str:
    return json.dumps({name: asdict(resources) for name, resources in rows.items()})


def versions() -> list[str]:
    """Return the Triton versions that have a table."""
    return sorted(path.stem for path in TABLES.glob("*.json"))


def checked_in(version: str) -> dict[str, Rows]:
    """Return the rows of one Triton version's table, by target."""
    table = json.loads((TABLES / f"{version}.json").read_text())
    return {target: parse(json.dumps(rows)) for target, rows in table.items()}


def render_table(targets: dict[str, Rows]) -> str:
    """Return a table as JSON, a line per kernel."""
    blocks = [
        f" {json.dumps(target)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(asdict(resources))}" for name, resources in rows.items())
        + "\n }"
        for target, rows in targets.items()
    ]
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def compile_alone(target: str) -> Rows:
    """Compile every launch for `target` in a process of its own, as a device has one.

    With two AMD targets in one process, Triton 3.6.0 lowers the second one's fp8 otherwise: it takes more registers and
    spills, which it does on no device.
    """
    command = [sys.executable, "-m", "tests.kernels.triton.resource_table", target]
    return parse(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def regressions(found: Rows, expected: Rows) -> list[str]:
    """Say what got worse: more registers or shared memory, fewer programs per multiprocessor, another matrix unit.

    What the table does not have yet has nothing to be compared with.
    """
    worse = []
    for name, was in expected.items():
        now = found[name]
        if now.registers > was.registers or now.shared_bytes > was.shared_bytes or now.programs < was.programs:
            worse.append(f"{name}: {now}, was {was}")
        elif now.matrix != was.matrix:
            worse.append(f"{name}: matrix unit {now.matrix}, was {was.matrix}")
    return worse


def main() -> None:
    if sys.argv[1:]:
        gc.disable()  # it goes through all of torch for every kernel: a tenth of the time
        print(render(compile_target(sys.argv[1])))
        return
    (TABLES / f"{VERSION}.json").write_text(render_table({target: compile_alone(target) for target in TARGETS}))


if __name__ == "__main__":
    main()
