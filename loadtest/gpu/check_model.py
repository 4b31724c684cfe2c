"""Whole models of every family against transformers, on the device they will be timed on."""

from __future__ import annotations

import queue
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from kernels.backend import load_backend
from loadtest.gpu.random_llama import layout_of
from loadtest.gpu.report import Check
from shared.engine.block_pool import BlockPool
from shared.engine.config import EngineConfig
from shared.engine.device_kv_cache import DeviceKvCache
from shared.engine.device_runner import DeviceRunner
from shared.engine.engine import Engine
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence
from shared.engine.step import StepOutputs
from shared.identity import Fingerprint, SessionId, namespace_hash
from shared.models.config import ModelConfig
from shared.models.load import load_decoder

_SIZES = {
    "vocab_size": 307, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.15,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 64}),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 64, "tie_word_embeddings": True}),
}
_LIMITS = {"max_batch_tokens": 96, "max_sequences": 8, "max_model_len": 256}
_NUM_BLOCKS = 200


def check_models(device: torch.device) -> list[Check]:
    """One check per family: the share of greedy tokens that differ from transformers' in float32; must be none."""
    small = device.type == "cpu"
    names = ["llama"] if small else list(_FAMILIES)
    return [_check(name, device, num_prompts=2 if small else 12, num_output=3 if small else 24) for name in names]


def _check(family: str, device: torch.device, *, num_prompts: int, num_output: int) -> Check:
    source = random.Random(7)
    longest = 150 if num_prompts > 2 else 20
    prompts = [[source.randrange(307) for _ in range(1 + i * longest // num_prompts)] for i in range(num_prompts)]
    with tempfile.TemporaryDirectory() as folder:
        expected = _transformers_tokens(family, Path(folder), device, prompts, num_output)
        found = _our_tokens(Path(folder), device, prompts, num_output)
    pairs = [(a, b) for left, right in zip(found, expected, strict=True) for a, b in zip(left, right, strict=True)]
    error = sum(a != b for a, b in pairs) / len(pairs)
    return Check(f"{family} against transformers, {num_prompts} prompts, {num_output} greedy tokens each", error, 0.0)


def _transformers_tokens(
    family: str, folder: Path, device: torch.device, prompts: list[list[int]], num_output: int
) -> list[list[int]]:
    import transformers

    class_name, special = _FAMILIES[family]
    config_class = getattr(transformers, class_name.replace("ForCausalLM", "Config"))
    torch.manual_seed(len(family))
    model = getattr(transformers, class_name)(config_class(**(_SIZES | special))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    model = model.to(device)
    with torch.inference_mode():
        return [
            model.generate(
                torch.tensor([prompt], device=device), do_sample=False, max_new_tokens=num_output,
                min_new_tokens=num_output,
            )[0, len(prompt) :].tolist()
            for prompt in prompts
        ]  # fmt: skip


def _our_tokens(folder: Path, device: torch.device, prompts: list[list[int]], num_output: int) -> list[list[int]]:
    config = ModelConfig.from_pretrained(folder, max_model_len=_LIMITS["max_model_len"])
    backend = load_backend("triton", device, torch.float32)
    model = load_decoder(folder, config, dtype="float32", device=device, backend=backend)
    runner = DeviceRunner(model, DeviceKvCache(_NUM_BLOCKS, layout_of(config, 16, "float32"), device), **_LIMITS)
    if device.type == "cuda":
        runner.warm_up(lambda done, total: None)
    messages: queue.SimpleQueue[StepOutputs] = queue.SimpleQueue()
    engine = Engine(runner, BlockPool(_NUM_BLOCKS, 16), EngineConfig(block_size=16, **_LIMITS), messages.put)
    sequences = [
        Sequence(
            session_id=SessionId(str(i)),
            token_ids=list(prompt),
            num_prompt_tokens=len(prompt),
            sampling=SamplingParams(max_tokens=num_output, temperature=0.0),
            namespace=namespace_hash(Fingerprint("check")),
        )
        for i, prompt in enumerate(prompts)
    ]
    engine.submit(sequences)
    engine.start()
    num_finished = 0
    while num_finished < len(sequences):
        num_finished += len(messages.get(timeout=300).finished)
    engine.stop()
    if failure := engine.stats().failure:
        raise RuntimeError(failure)
    return [sequence.token_ids[sequence.num_prompt_tokens :] for sequence in sequences]
