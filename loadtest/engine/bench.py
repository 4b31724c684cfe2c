"""`make bench`: Tandem's CPU engine beside transformers and llama.cpp, and what the services around it cost.

    python -m loadtest.engine.bench --name zen3                # all of it, a quarter of an hour on two cores of a Zen 3
    python -m loadtest.engine.bench --name zen3 --only 500m "500m int8"
    python -m loadtest.engine.bench --name try --quick         # does it run at all? Numbers worth nothing

Everything is in pieces, each a benchmark of its own and a process of its own, that add to one report: what is measured
anew replaces what was there. At the end the report's JSON lies beside its tables in Markdown and its plots.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from loadtest.engine import plots, report
from loadtest.engine.machine import multiplies_bfloat16
from loadtest.engine.tables import markdown

RESULTS = Path(__file__).parents[1] / "results"
_DECODE = ("decode 1", "decode 8", "decode 32")
_CURVE = tuple(f"decode {batch}" for batch in (1, 2, 4, 8, 16, 32))
_QUICK = ("decode 1", "decode 2")


def pieces(threads: int, *, quick: bool) -> dict[str, list[str]]:
    """What is run for each piece: a module and its arguments, to which `--json` is added."""

    def compare(shape: str, group: str, *tasks: str, rounds: int, options: tuple[str, ...] = ("--ways",)) -> list[str]:
        if quick:
            tasks, rounds = tuple(task for task in tasks if task in _QUICK), 1
        what = ("--shapes", shape, "--groups", group, "--tasks", *tasks, "--rounds", str(rounds))
        return ["loadtest.engine.compare", "--threads", str(threads), *what, *options]

    few = ("--requests", "4") if quick else ()
    ways = ("--ways", "32", "continuous", "1", "--one-by-one", "2", *few)
    suite = ("--suites", "aggregated", "--rounds", "1", *(("--count", "8") if quick else ()))
    # Where bfloat16 is not multiplied llama.cpp has both types, and float16 is its faster one.
    one_llama_cpp = () if multiplies_bfloat16() else ("--without", "llama.cpp:bf16")
    short = ("--context", "64")
    prefill = "prefill 512"
    return {
        "135m": compare("135m", "16-bit", *_CURVE, prefill, rounds=3),
        "135m int8": compare("135m", "int8", *_DECODE, prefill, rounds=3),
        "135m int4": compare("135m", "int4", "decode 1", rounds=5),
        "breakdown": ["loadtest.engine.step_breakdown", "--threads", str(threads), "--kinds", "greedy"],
        "suite": ["loadtest.suite_share", "--shape", "135m", "--streams", "32", *suite],
        "workload": compare("135m", "16-bit", rounds=1, options=(*ways, *one_llama_cpp)),
        "500m": compare("500m", "16-bit", *_DECODE, prefill, rounds=2, options=("--ways", *short, *one_llama_cpp)),
        "500m int8": compare("500m", "int8", *_DECODE, prefill, rounds=2, options=("--ways", *short)),
        "500m int4": compare("500m", "int4", "decode 1", rounds=3, options=("--ways", *short)),
    }


def run(name: str, command: list[str], path: Path) -> bool:
    """One piece; False if it failed. Its time is part of the report."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    started_s = time.monotonic()
    result = subprocess.run([sys.executable, "-m", *command, "--json", str(path)], check=False)
    seconds = time.monotonic() - started_s
    print(f"== {name}: {seconds:.0f} s" + (f", exit code {result.returncode}" if result.returncode else ""), flush=True)
    if not result.returncode:
        report.add(path, {"took_s": {name: round(seconds)}})
    return not result.returncode


def main() -> None:
    """Runs the pieces and writes JSON, Markdown and plots; exits with 1 if a piece failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(pieces(1, quick=False))
    parser.add_argument("--name", default="cpu", help="of the files that are written")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", choices=names, help="pieces; all by default")
    parser.add_argument("--without", nargs="+", default=[], choices=names)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each engine; the suite has all")
    parser.add_argument("--minutes", type=float, default=15, help="no piece begins later; those left out are named")
    parser.add_argument("--quick", action="store_true", help="one round of little, for trying the benchmark itself")
    options = parser.parse_args()
    path = options.results / f"{options.name}.json"
    chosen = pieces(options.threads, quick=options.quick)
    names = [name for name in options.only or names if name not in options.without]
    started_s = time.monotonic()
    failed, left_out = [], []
    for name in names:
        if time.monotonic() - started_s > 60 * options.minutes:
            left_out.append(name)
        elif not run(name, chosen[name], path):
            failed.append(name)
    measured = report.read(path)
    path.with_suffix(".md").write_text(markdown(measured))
    plots.draw_all(measured, path)
    print(f"== {time.monotonic() - started_s:.0f} s, {path.with_suffix('.md')}; failed: {failed}, left out: {left_out}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
