"""`make chaos`: rounds of faults for as long as told, and a report.

make chaos ARGS="--minutes 10"        make chaos ARGS="--seed 7 --rounds 3"    replays what a seed did
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.chaos.cases import LONG_EVERY, make_cases
from tests.chaos.faults import KINDS, Saboteur, small_disk
from tests.chaos.partitions import own_network
from tests.chaos.rounds import Chaos
from tests.e2e.conftest import Suite, local_gateway, start_suite, stop_suite

OPTIONS = ("--prefill", "1", "--decode", "2", "--threads", "1", "--kv-cache-bytes", "48MiB", "--tier-bytes", "24MiB")


@contextlib.contextmanager
def chaotic_suite(scratch: Path) -> Iterator[tuple[Suite, Saboteur]]:
    """A suite whose sidecars obey a control file, with little memory and, where it can be had, a disk soon full."""
    control = scratch / "control.json"
    control.write_text("{}")
    disk, undo = small_disk()
    added = {
        "TANDEM_CHAOS_CONTROL": str(control),
        "TANDEM_WORKER_PULL_TIMEOUT_S": "2",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "in_flight"), os.environ.get("PYTHONPATH", "")]),
    }
    if disk:
        added |= {"TANDEM_TRANSFER_DISK_PATH": str(disk), "TANDEM_TRANSFER_DISK_BYTES": str(64 << 20)}
    before = dict(os.environ)
    os.environ |= added
    try:
        suite = start_suite(scratch / "run", *OPTIONS)
    finally:
        os.environ.clear()
        os.environ |= before
    try:
        yield suite, Saboteur(suite, control)
    finally:
        try:
            stop_suite(suite)
        finally:
            undo()


@contextlib.contextmanager
def possible_kinds() -> Iterator[list[str]]:
    """Kinds of faults that this machine lets us do as long as the context is open; says why not the others."""
    with own_network() as reason:
        if reason:
            print(f"without partition: {reason}")
        yield [kind for kind in KINDS if not (reason and kind == "partition")]


def main() -> None:
    """Runs, prints, exits with 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=0, help="instead of minutes")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--cases", type=int, default=4 * LONG_EVERY, help="different ones")
    parser.add_argument("--kinds", nargs="*", help="only these")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path, help="keep the processes' logs here")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with (
        possible_kinds() as kinds,
        tempfile.TemporaryDirectory(prefix="tandem-chaos-") as folder,
        chaotic_suite(Path(folder)) as (suite, saboteur),
    ):
        say = partial(print, flush=True)
        chaos = Chaos(suite, saboteur, make_cases(options.cases), options.kinds or kinds, say)
        with local_gateway(suite) as url:
            asyncio.run(chaos.learn(url))
        try:
            seconds = 0.0 if options.rounds else 60 * options.minutes
            asyncio.run(
                chaos.run(random.Random(options.seed), rounds=options.rounds, seconds=seconds, streams=options.streams)
            )
        finally:
            report = {"seed": options.seed, **chaos.report.as_dict()}
            print(json.dumps(report, indent=2))
            if options.json:
                options.json.write_text(json.dumps(report, indent=2) + "\n")
            if options.logs:
                shutil.copytree(suite.run_dir / "logs", options.logs, dirs_exist_ok=True)
    sys.exit(bool(chaos.report.wrong))


if __name__ == "__main__":
    main()
