"""A checkpoint of random weights, small enough to be computed in no time."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory):
    """Directory of a Qwen3 of two layers, with 61 tokens, untied."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=1,
    )
    directory = tmp_path_factory.mktemp("tiny-qwen3")
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory
