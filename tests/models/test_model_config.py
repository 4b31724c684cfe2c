"""Reading config.json: both generations of transformers' spelling, and what is refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shared.errors import ConfigurationError
from shared.models.config import ModelConfig, resolve_dtype
from shared.models.rope import RopeScaling

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "eos_token_id": 2,
}


def read(directory, changes=None, *, without=(), generation=None, **options):
    raw = {name: value for name, value in (LLAMA | (changes or {})).items() if name not in without}
    (directory / "config.json").write_text(json.dumps(raw))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_pretrained(directory, **options)


def test_absent_fields_have_the_meaning_they_have_in_transformers(tmp_path):
    config = read(tmp_path, without=["num_key_value_heads"])
    assert (config.num_kv_heads, config.head_dim, config.max_model_len) == (4, 16, 2048)
    assert config.rope == RopeScaling(10000.0)
    assert config.eos_token_ids == (2,)
    assert not any((config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm))
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    ("config_class", "architecture", "flags"),
    [
        (LlamaConfig, "LlamaForCausalLM", (False, False, False)),
        (MistralConfig, "MistralForCausalLM", (False, False, False)),
        (Qwen2Config, "Qwen2ForCausalLM", (True, False, False)),
        (Qwen3Config, "Qwen3ForCausalLM", (False, False, True)),
    ],
)
def test_what_transformers_saves_is_understood(tmp_path, config_class, architecture, flags):
    config_class(architectures=[architecture], max_position_embeddings=4096).save_pretrained(tmp_path)
    config = ModelConfig.from_pretrained(tmp_path)
    assert (config.qkv_bias, config.output_bias, config.qk_norm) == flags
    assert config.head_dim == 128


def test_generation_config_decides_what_ends_a_sequence(tmp_path):
    assert read(tmp_path, generation={"eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
    assert read(tmp_path, generation={"temperature": 0.6}).eos_token_ids == (2,)
    assert read(tmp_path, {"eos_token_id": None}, generation={}).eos_token_ids == ()


def test_unsupported_architecture_is_named_with_the_supported_ones(tmp_path):
    with pytest.raises(ConfigurationError, match=r"GemmaForCausalLM is not supported; supported: LlamaForCausalLM, M"):
        read(tmp_path, {"architectures": ["GemmaForCausalLM"]})
    with pytest.raises(ConfigurationError, match="model_type 'llama' is not supported"):
        read(tmp_path, without=["architectures"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized checkpoints \(gptq\)"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "RoPE type 'yarn' is not supported; supported: default"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "no field 'factor'"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"num_attention_heads": 3}, "num_attention_heads 3 is not a multiple of num_key_value_heads 2"),
        ({"vocab_size": "many"}, "invalid literal"),
        ({"hidden_size": None}, "int"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(tmp_path, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        read(tmp_path, changes)


def test_missing_field_is_named_with_its_file(tmp_path):
    with pytest.raises(ConfigurationError, match=r"config\.json: no field 'intermediate_size'"):
        read(tmp_path, without=["intermediate_size"])


@pytest.mark.parametrize(
    ("text", "message"), [(None, "not a Hugging Face checkpoint"), ("{", "as JSON"), ("[]", "object")]
)
def test_a_directory_without_a_readable_config_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        ModelConfig.from_pretrained(tmp_path)


def test_a_limit_on_the_context_must_lie_below_the_models(tmp_path):
    assert read(tmp_path, max_model_len=100).max_model_len == 100
    with pytest.raises(ConfigurationError, match="max_model_len 4000 exceeds the model's 2048"):
        read(tmp_path, max_model_len=4000)


def test_a_sliding_window_is_refused_only_where_it_would_change_results(tmp_path):
    mistral = {"architectures": ["MistralForCausalLM"], "sliding_window": 512}
    with pytest.raises(ConfigurationError, match=r"over 512 tokens .* at most 512 \(now 2048\)"):
        read(tmp_path, mistral)
    assert read(tmp_path, mistral, max_model_len=512).max_model_len == 512
    assert read(tmp_path, mistral | {"sliding_window": None}).max_model_len == 2048
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 512, "use_sliding_window": False}
    assert read(tmp_path, qwen).max_model_len == 2048
    with pytest.raises(ConfigurationError, match="sliding-window"):
        read(tmp_path, qwen | {"use_sliding_window": True})


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_scaled_frequencies_equal_transformers_in_both_spellings(tmp_path, scaling):
    new = read(tmp_path, {"rope_parameters": scaling | {"rope_theta": 500000.0}}).rope
    old = read(tmp_path, {"rope_theta": 500000.0, "rope_scaling": scaling}).rope
    assert new == old
    theirs = LlamaConfig(rope_parameters=scaling | {"rope_theta": 500000.0}, head_dim=64, max_position_embeddings=8192)
    expected, attention_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, torch.device("cpu"))
    assert attention_factor == 1.0
    np.testing.assert_allclose(new.inverse_frequencies(64), expected.numpy(), rtol=1e-6)


def test_auto_dtype_is_float32_on_a_cpu_and_bfloat16_on_a_gpu():
    assert resolve_dtype("auto", "cpu") == "float32"
    assert resolve_dtype("auto", "cuda") == "bfloat16"
    assert resolve_dtype("float16", "cpu") == "float16"
    with pytest.raises(ConfigurationError, match="unknown dtype 'int8'; known: auto, float32"):
        resolve_dtype("int8", "cpu")


def test_what_the_gateway_imports_brings_no_torch():
    code = (
        "import sys, shared.models.config, shared.models.resolve, shared.models.fingerprint, "
        "shared.engine.sampling_params; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
