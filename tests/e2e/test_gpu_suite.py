"""The whole suite on a GPU: KV handed over in device memory, and the same words as without a hand-over."""

import os
import signal
import time

import pytest
import torch

from tests.e2e.conftest import start_suite, stop_suite

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

PROMPTS = [
    "What does json.dumps do?",
    "Explain itertools.chain and give an example with lists. " * 6,
    "How do I copy a tree of files with shutil? " * 12,
]


def say(suite) -> list[str]:
    client = suite.client()
    return [
        client.completions.create(
            model="pydoc-mini", prompt=prompt, max_tokens=40, temperature=temperature, seed=7,
            extra_body={"ignore_eos": True},
        ).choices[0].text
        for prompt in PROMPTS
        for temperature in (0.0, 1.0)
    ]  # fmt: skip


MODES = {
    "float32": ["--dtype", "float32"],
    # Rounded as they are, these differ by no bit: who computed what does not matter.
    "bfloat16 over fp8, invariant": ["--dtype", "bfloat16", "--kv-cache-dtype", "fp8", "--numerics", "invariant"],
}


@pytest.mark.parametrize("mode", MODES)
def test_disaggregated_on_a_gpu_says_what_one_worker_says_and_moves_kv_between_devices(tmp_path, mode):
    common = ["--device", "cuda", "--gpu-memory-utilization", "0.2", *MODES[mode]]
    alone = start_suite(tmp_path / "alone", "--prefill", "0", "--decode", "1", *common)
    try:
        expected = say(alone)
    finally:
        stop_suite(alone)
    apart = start_suite(tmp_path / "apart", "--prefill", "1", "--decode", "1", *common)
    try:
        assert say(apart) == expected
        transfers = {worker["role"]: worker["transfer"] for worker in apart.status()["workers"]}
        assert transfers["decode"]["received_bytes"] > 0
        assert transfers["decode"]["mismatched_blocks"] == 0
        assert transfers["decode"]["transport"] == "ucx:cuda"
    finally:
        stop_suite(apart)


def worker_of(suite) -> dict | None:
    return next((worker for worker in suite.status()["workers"] if worker["role"] == "decode"), None)


def until(condition) -> None:
    deadline_s = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def test_a_killed_gpu_worker_finds_what_it_had_in_its_host_tier(tmp_path):
    """Device memory went with the process; while it was idle the worker had copied everything."""
    suite = start_suite(tmp_path / "suite", "--prefill", "0", "--decode", "1", "--device", "cuda", *MODES["float32"])
    try:
        expected = say(suite)
        first = worker_of(suite)
        until(lambda: worker_of(suite)["transfer"]["tier_blocks"] >= 10)
        process = next(process for process in suite.status()["processes"] if process["name"] == "decode-0")
        os.kill(process["pid"], signal.SIGKILL)

        def lives_again() -> bool:
            now = worker_of(suite)
            return now is not None and now["ready"] and now["incarnation"] != first["incarnation"]

        until(lives_again)
        assert say(suite) == expected
        assert worker_of(suite)["transfer"]["mismatched_blocks"] == 0
    finally:
        stop_suite(suite)
