"""Checkpoints of well-known shapes with random weights: speed does not depend on what a model knows."""

from __future__ import annotations

import shutil
from pathlib import Path

BUNDLED = Path(__file__).parents[2] / "shared" / "assets" / "pydoc-mini"

SHAPES: dict[str, dict[str, object]] = {
    "135m": {  # SmolLM2-135M
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "rope_theta": 100000.0,
    },
    "500m": {  # Qwen2.5-0.5B, as a Llama: every engine here has that one
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
    },
}
MAX_POSITIONS = 8192


def checkpoint(name: str, cache: Path) -> Path:
    """The checkpoint of a shape, made once: bfloat16, tied embeddings, the bundled model's tokenizer.

    Args:
        name: A key of `SHAPES`.
        cache: Where checkpoints are kept between runs.
    """
    directory = cache / name
    if (directory / "model.safetensors").exists():
        return directory
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[name], max_position_embeddings=MAX_POSITIONS, tie_word_embeddings=True, dtype="bfloat16"
    )
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    directory.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (BUNDLED / file).exists():
            shutil.copy(BUNDLED / file, directory / file)
    model.save_pretrained(directory)
    return directory
