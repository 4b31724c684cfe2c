"""The checked-in table of what every kernel takes on every target, and the comparison with it.

python -m tests.kernels.triton.resource_table            rewrites resources.json
python -m tests.kernels.triton.resource_table sm_90      prints one target's rows as JSON
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import triton

from tests.kernels.triton.launches import launches_of
from tests.kernels.triton.offline_compiler import TARGETS, Resources, compiled_for

TABLE = Path(__file__).with_name("resources.json")
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


def checked_in() -> tuple[str, dict[str, Rows]]:
    """Return the Triton version of the table and its rows by target."""
    table = json.loads(TABLE.read_text())
    return table["triton"], {target: parse(json.dumps(rows)) for target, rows in table["targets"].items()}


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
        print(render(compile_target(sys.argv[1])))
        return
    rows = {target: json.loads(render(compile_target(target))) for target in TARGETS}
    TABLE.write_text(json.dumps({"triton": triton.__version__, "targets": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
