"""The shape of `pydoc-mini`, and how its checkpoint is written so that every recent transformers reads it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save
from transformers import Qwen3Config, Qwen3ForCausalLM

from shared.assets.recipe.tokenizer import BOS, IM_END, MAX_POSITIONS, PAD, SPECIAL_TOKENS, VOCAB_SIZE

ROPE_THETA = 10000.0
CONFIG: dict[str, object] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1024,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_POSITIONS,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "use_cache": True,
    "use_sliding_window": False,
    "bos_token_id": SPECIAL_TOKENS.index(BOS),
    "eos_token_id": SPECIAL_TOKENS.index(IM_END),
    "pad_token_id": SPECIAL_TOKENS.index(PAD),
    # transformers 4 reads the first of each pair, transformers 5 the second.
    "rope_theta": ROPE_THETA,
    "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
    "torch_dtype": "bfloat16",
    "dtype": "bfloat16",
}


def new_model(seed: int) -> Qwen3ForCausalLM:
    """Builds the fp32 model with random weights drawn from `seed`."""
    torch.manual_seed(seed)
    shape = {key: value for key, value in CONFIG.items() if key not in {"torch_dtype", "dtype", "rope_theta"}}
    return Qwen3ForCausalLM(Qwen3Config.from_dict(shape))


def write_checkpoint(model: Qwen3ForCausalLM, directory: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors in bf16 (the tied head is not stored)."""
    directory.mkdir(parents=True, exist_ok=True)
    generation = {key: CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation |= {"do_sample": False, "max_new_tokens": 96}
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    (directory / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
