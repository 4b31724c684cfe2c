"""What the modes cost: batch invariance and the fp8 cache, beside the usual kernels and in whole steps.

    python -m loadtest.gpu.measure_modes --out loadtest/gpu/results

writes `<gpu>-modes.json` and `<gpu>-modes.md`; the steps are of Llama-3-8B's shape. Results are written after every
group, so that a lease that ends early leaves what it found; a group that would begin after `--seconds` is named as
skipped. The tests walk it without a GPU: `measure("cpu", ...)` in Triton's interpreter, on tiny shapes, with times that
mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from loadtest.gpu.limits import Limits, measure_limits
from loadtest.gpu.measure_invariance import check_bits, measure_invariant_attention, measure_invariant_products
from loadtest.gpu.measure_kernels import hardware
from loadtest.gpu.measure_steps import measure_decode_steps, measure_prefill_steps
from loadtest.gpu.random_llama import layout_of, llama_8b, random_decoder, sized_runner, tiny_llama
from loadtest.gpu.report import Check, Report, Row
from loadtest.gpu.timing import Stopwatch

_LIMITS = {"max_batch_tokens": 8192, "max_sequences": 256, "max_model_len": 8192}
_SMALL = {"max_batch_tokens": 24, "max_sequences": 2, "max_model_len": 128}
_MODES = [("fast", "bfloat16"), ("fast", "float8_e4m3fn"), ("invariant", "bfloat16"), ("invariant", "float8_e4m3fn")]
"""Numerics and KV dtype of whole steps."""

Found = Iterator[Check | Row]


def main() -> int:
    """Run everything on the GPU; the exit status is 1 if bits differ or a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("loadtest/gpu/results"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=480.0, help="no group begins later than this")
    options = parser.parse_args()
    name = torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")
    report = measure("cuda", seconds=options.seconds, keep=lambda found: found.write(options.out, f"{name}-modes"))
    wrong = [check for check in report.checks if not check.passes and check.error != float("inf")]
    return 1 if wrong else 0


@torch.inference_mode()
def measure(device: str, *, seconds: float, keep: Callable[[Report], None]) -> Report:
    """Measure group by group; say each result as it comes.

    Args:
        device: "cuda", or "cpu" for tiny shapes.
        seconds: No group begins later.
        keep: Called with all results so far after every group.
    """
    torch.manual_seed(0)
    started_s, small = time.monotonic(), device == "cpu"
    watch = Stopwatch(device)
    limits, rows = measure_limits(watch, small=small)
    report = Report(
        hardware(device), [], rows, title="Batch invariance and the fp8 cache, measured", script="measure_modes",
        oracle="float64, or the bits themselves",
    )  # fmt: skip
    checks: list[Check] = []
    for name, group in _groups(watch, limits, small=small).items():
        spent_s = time.monotonic() - started_s
        if spent_s > seconds:
            print(f"skipped after {spent_s:.0f} s: {name}", flush=True)
            rows.append(Row("skipped for want of time", name, 0.0))
            continue
        for found in group():
            (checks if isinstance(found, Check) else rows).append(found)  # type: ignore[arg-type]
            print(_line(found), flush=True)
        report = Report(report.hardware, checks, rows, title=report.title, script=report.script, oracle=report.oracle)
        keep(report)
    return report


def _groups(watch: Stopwatch, limits: Limits, *, small: bool) -> dict[str, Callable[[], Found]]:
    """By urgency: correctness, then costs."""
    groups: dict[str, Callable[[], Found]] = {
        "bits of invariant mode": lambda: check_bits(watch.device, small=small),
        "invariant attention": lambda: measure_invariant_attention(watch, limits, small=small),
        "invariant products": lambda: measure_invariant_products(watch, limits, small=small),
    }
    for numerics, kv_dtype in _MODES[-1:] if small else _MODES:
        name = f"steps, {numerics}, KV {kv_dtype}"
        groups[name] = lambda n=numerics, k=kv_dtype: _steps(watch, limits, n, k, small=small)  # type: ignore[misc]
    return groups


def _steps(watch: Stopwatch, limits: Limits, numerics: str, kv_dtype: str, *, small: bool) -> Found:
    """Whole steps of one mode, warmed up and captured as when serving."""
    device = torch.device(watch.device)
    config = tiny_llama() if small else llama_8b()
    layout = layout_of(config, 16, kv_dtype)
    model = random_decoder(config, device, torch.bfloat16, numerics)
    runner, num_blocks, _ = sized_runner(model, layout, utilization=0.85, **(_SMALL if small else _LIMITS))
    started_s = time.perf_counter()
    runner.warm_up(lambda done, total: None)
    group = f"steps, {numerics}, KV {kv_dtype}"
    yield Row(group, f"warm-up, {runner.num_shapes} shapes", (time.perf_counter() - started_s) * 1e6)
    for measure_steps in (measure_decode_steps, measure_prefill_steps):
        for row in measure_steps(runner, config, layout, num_blocks, limits, small=small):
            yield Row(group, row.name, row.time_us, row.rate, row.unit, row.limit, goal=row.goal)
    del runner, model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _line(found: Check | Row) -> str:
    if isinstance(found, Check):
        return f"{'passed' if found.passes else 'FAILED'} {found.name}: {found.error:.2e}"
    return f"{found.group} | {found.name}: {found.time_us:.1f} us, {found.rate:.4g} {found.unit}, {found.share:.3f}"


if __name__ == "__main__":
    sys.exit(main())
