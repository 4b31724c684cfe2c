"""Runs a whole model of Llama-3-8B's shape on the GPU at hand: steps, prompts, a thousand requests, and others beside.

    python -m loadtest.gpu.measure_model --out loadtest/gpu/results

writes `<gpu>-model.json` and `<gpu>-model.md`. The tests walk it without a GPU: `measure("cpu")` in Triton's
interpreter, on a tiny model, with times that mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path

import torch

from loadtest.gpu.check_model import check_models
from loadtest.gpu.limits import measure_limits
from loadtest.gpu.measure_kernels import hardware
from loadtest.gpu.measure_requests import draw_requests, measure_requests
from loadtest.gpu.measure_steps import measure_decode_steps, measure_prefill_steps
from loadtest.gpu.measure_transformers import BATCH, transformers_tokens_per_s
from loadtest.gpu.random_llama import layout_of, llama_8b, random_decoder, sized_runner, tiny_llama
from loadtest.gpu.report import Report, Row
from loadtest.gpu.timing import Stopwatch
from shared.engine.config import EngineConfig

_LIMITS = {"max_batch_tokens": 8192, "max_sequences": 512, "max_model_len": 8192}
_SMALL = {"max_batch_tokens": 24, "max_sequences": 2, "max_model_len": 128}
_STEP_TOKENS = 2048
"""Of the requests' steps: the largest that is captured."""


def main() -> int:
    """Run everything on the GPU; the exit status is 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("loadtest/gpu/results"), help="folder of the results")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--sequences", type=int, default=_LIMITS["max_sequences"])
    parser.add_argument("--without-transformers", action="store_true")
    options = parser.parse_args()
    report = measure(
        "cuda",
        num_requests=options.requests,
        max_sequences=options.sequences,
        with_transformers=not options.without_transformers,
    )
    name = torch.cuda.get_device_name().lower().replace("nvidia ", "").replace(" ", "-")
    report.write(options.out, f"{name}-model")
    return 0 if all(check.passes for check in report.checks) else 1


@torch.inference_mode()
def measure(device_name: str, *, num_requests: int, max_sequences: int, with_transformers: bool) -> Report:
    """Check, then time; say each result as it comes. On "cpu", a tiny model."""
    torch.manual_seed(0)
    small = device_name == "cpu"
    device = torch.device(device_name)
    checks = check_models(device)
    for check in checks:
        print(f"{'passed' if check.passes else 'FAILED'} {check.name}: {check.error:.2e}", flush=True)
    limits, rows = measure_limits(Stopwatch(device_name), small=small)
    config = tiny_llama() if small else llama_8b()
    layout = layout_of(config, 16, "float32" if small else "bfloat16")
    model = random_decoder(config, device, torch.float32 if small else torch.bfloat16)
    limit_args = _SMALL if small else _LIMITS | {"max_sequences": max_sequences}
    runner, num_blocks, memory = sized_runner(model, layout, utilization=0.85, **limit_args)
    started_s = time.perf_counter()
    runner.warm_up(lambda done, total: None)
    details: dict[str, object] = {"warm_up_s": time.perf_counter() - started_s, "shapes": runner.num_shapes}
    details |= {"num_blocks": num_blocks, "memory": str(memory)}

    def note(row: Row) -> None:
        rows.append(row)
        print(f"{row.name}: {row.time_us:.1f} us, {row.rate:.4g} {row.unit}, {row.share:.3f}", flush=True)

    for row in measure_decode_steps(runner, config, layout, num_blocks, limits, small=small):
        note(row)
    for row in measure_prefill_steps(runner, config, layout, num_blocks, limits, small=small):
        note(row)
    requests = draw_requests(config.vocab_size, num_requests, longest=7 if small else 1024)
    engine_config = EngineConfig(
        block_size=16,
        max_model_len=limit_args["max_model_len"],
        max_batch_tokens=limit_args["max_batch_tokens"] if small else _STEP_TOKENS,
        max_sequences=limit_args["max_sequences"],
        max_waiting=num_requests,
    )
    row, counts = measure_requests(runner, requests, num_blocks, engine_config)
    note(row)
    details |= counts
    if device.type == "cuda":
        details["peak_memory_gib"] = torch.cuda.max_memory_reserved() / (1 << 30)
    if with_transformers:
        del runner, model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        theirs = transformers_tokens_per_s(config, device, requests)
        name = f"transformers generate, batches of {BATCH}: {theirs:,.0f} output tokens/s; ours is so many times that"
        note(Row("requests", name, 1e6 / theirs, row.rate / theirs, "x", goal=24.0, goal_kind="rate"))
    print(json.dumps(details), flush=True)
    return Report(
        hardware(device_name) | {key: str(value) for key, value in details.items()},
        checks,
        rows,
        title="A model of Llama-3-8B's shape, measured",
        script="measure_model",
        oracle="transformers",
    )


if __name__ == "__main__":
    sys.exit(main())
