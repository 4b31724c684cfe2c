"""Llama-3-8B's shape with random weights, made on the device: speed does not depend on what a model knows."""

from __future__ import annotations

import torch

from kernels.backend import load_backend
from shared.engine.device_kv_cache import DeviceKvCache
from shared.engine.device_memory import DeviceMemory, measure_device_memory
from shared.engine.device_runner import DeviceRunner
from shared.kv_arena import KvLayout
from shared.models.config import ModelConfig
from shared.models.decoder import Decoder, LayerWeights
from shared.models.rope import RopeScaling


def llama_8b(max_model_len: int = 8192) -> ModelConfig:
    """Meta-Llama-3-8B."""
    return ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32,
        num_heads=32, num_kv_heads=8, head_dim=128, rms_norm_eps=1e-5, rope=RopeScaling(500000.0),
        max_model_len=max_model_len, qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm=False,
        tie_word_embeddings=False, eos_token_ids=(128001,), checkpoint_dtype="bfloat16",
    )  # fmt: skip


def tiny_llama(max_model_len: int = 256) -> ModelConfig:
    """For a run without a GPU."""
    return ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=200, hidden_size=64, intermediate_size=64, num_layers=1,
        num_heads=2, num_kv_heads=1, head_dim=32, rms_norm_eps=1e-5, rope=RopeScaling(10000.0),
        max_model_len=max_model_len, qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm=False,
        tie_word_embeddings=False, eos_token_ids=(1,), checkpoint_dtype="bfloat16",
    )  # fmt: skip


def random_decoder(config: ModelConfig, device: torch.device, dtype: torch.dtype, numerics: str = "fast") -> Decoder:
    """Weights that keep activations near one."""
    backend = load_backend("triton", device, dtype, numerics=numerics)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype).mul_(shape[-1] ** -0.5)

    hidden, wide = config.hidden_size, config.intermediate_size
    width = config.num_heads * config.head_dim
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    ones = torch.ones(hidden, device=device, dtype=dtype)
    layers = [
        LayerWeights(
            attention_norm=ones, qkv=backend.linear(weight(heads, hidden), None), query_norm=None, key_norm=None,
            output=backend.linear(weight(hidden, width), None), feed_forward_norm=ones,
            gate_up=backend.linear(weight(2 * wide, hidden), None), down=backend.linear(weight(hidden, wide), None),
        )
        for _ in range(config.num_layers)
    ]  # fmt: skip
    embedding = weight(config.vocab_size, hidden)
    head = backend.linear(weight(config.vocab_size, hidden), None)
    return Decoder(config, backend, embedding=embedding, layers=layers, final_norm=ones, lm_head=head)


def weight_bytes(config: ModelConfig) -> int:
    """Bytes that every step reads: all layers and the LM head, two per parameter."""
    width = config.num_heads * config.head_dim
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = config.hidden_size * (heads + width + 3 * config.intermediate_size)
    return 2 * (config.num_layers * layer + config.vocab_size * config.hidden_size)


def layout_of(config: ModelConfig, block_size: int, dtype: str) -> KvLayout:
    """Of the model's KV cache."""
    return KvLayout(config.num_layers, block_size, config.num_kv_heads, config.head_dim, dtype)


def sized_runner(
    model: Decoder, layout: KvLayout, *, utilization: float, **limits: int
) -> tuple[DeviceRunner, int, DeviceMemory | None]:
    """A runner whose cache fills the device, or has 64 blocks on a CPU; its blocks, and what the memory went to."""
    memory, num_blocks = None, 64
    if model.device.type == "cuda":
        probe = DeviceRunner(model, DeviceKvCache(1, layout, model.device), **limits)
        memory = measure_device_memory(
            model.device, probe.run_largest, num_captured=probe.num_shapes, utilization=utilization
        )
        del probe
        num_blocks = memory.num_blocks(layout)
    return DeviceRunner(model, DeviceKvCache(num_blocks, layout, model.device), **limits), num_blocks, memory
