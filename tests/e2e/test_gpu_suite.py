"""The whole suite on a GPU: KV handed over in device memory, and the same words as without a hand-over."""

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


def test_disaggregated_on_a_gpu_says_what_one_worker_says_and_moves_kv_between_devices(tmp_path):
    common = ["--device", "cuda", "--dtype", "float32", "--gpu-memory-utilization", "0.2"]
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
