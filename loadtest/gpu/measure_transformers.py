"""transformers' `generate` on the same requests and the same shape, in batches of 16: what people have without us."""

from __future__ import annotations

import time

import torch

from loadtest.gpu.measure_requests import TokenRequest
from shared.models.config import ModelConfig

BATCH = 16


def transformers_tokens_per_s(
    config: ModelConfig, device: torch.device, requests: list[TokenRequest], num_batches: int = 2
) -> float:
    """Useful output tokens per second: a batch runs as long as its longest request, padding counts for nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, max_position_embeddings=config.max_model_len,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta}, eos_token_id=None,
        bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(shape).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    useful, elapsed_s = 0, 0.0
    _generate(model, requests[:2], device, 4)
    for start in range(0, min(num_batches * BATCH, len(requests)), BATCH):
        batch = requests[start : start + BATCH]
        started_s = time.perf_counter()
        _generate(model, batch, device, max(request.output_tokens for request in batch))
        elapsed_s += time.perf_counter() - started_s
        useful += sum(request.output_tokens for request in batch)
    return useful / elapsed_s


def _generate(model: torch.nn.Module, batch: list[TokenRequest], device: torch.device, num_tokens: int) -> None:
    longest = max(len(request.prompt) for request in batch)
    rows = [[0] * (longest - len(request.prompt)) + request.prompt for request in batch]
    mask = [[0] * (longest - len(request.prompt)) + [1] * len(request.prompt) for request in batch]
    with torch.inference_mode():
        model.generate(  # type: ignore[operator]
            torch.tensor(rows, device=device), attention_mask=torch.tensor(mask, device=device), do_sample=False,
            max_new_tokens=num_tokens, min_new_tokens=num_tokens,
        )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.synchronize()
