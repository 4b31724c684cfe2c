"""Encoders on random weights against transformers; saved with and without heads; packed in any company."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel, XLMRobertaConfig, XLMRobertaModel

from shared.errors import ConfigurationError
from shared.models.config import ModelConfig
from shared.models.encoder_config import EncoderConfig, is_encoder
from shared.models.load_encoder import load_encoder

SIZES = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "initializer_range": 0.15,
    "hidden_dropout_prob": 0.0,
}
FAMILIES = {
    "bert": (BertModel, BertConfig(**SIZES)),
    "bert-masked-lm": (BertForMaskedLM, BertConfig(**SIZES)),
    "bert-tanh": (BertModel, BertConfig(**SIZES, hidden_act="gelu_new", layer_norm_eps=1e-5)),
    "xlm-roberta": (XLMRobertaModel, XLMRobertaConfig(**SIZES, pad_token_id=1, type_vocab_size=1)),
}
TOLERANCE = 1e-5
"""Of hidden states up to about 4: both sides sum in float32, in different orders."""


def save(family, directory):
    model_class, config = FAMILIES[family]
    torch.manual_seed(7)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "LayerNorm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    return getattr(model, "bert", model)


def load(directory):
    return load_encoder(directory, EncoderConfig.from_pretrained(directory), dtype=torch.float32)


@pytest.fixture(scope="module")
def inputs():
    source = random.Random(3)
    return [[source.randrange(2, 211) for _ in range(length)] for length in (1, 7, 64, 2, 33)]


@pytest.mark.parametrize("family", FAMILIES)
def test_states_equal_transformers_packed_and_alone(family, tmp_path, inputs):
    reference = save(family, tmp_path)
    assert is_encoder(tmp_path)
    encoder = load(tmp_path)
    assert encoder.config.max_model_len == (64 if family == "xlm-roberta" else 66)
    for token_ids, packed in zip(inputs, encoder.forward(inputs), strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([token_ids])).last_hidden_state[0]
        assert (packed - expected).abs().max() < TOLERANCE
        assert (encoder.forward([token_ids])[0] - packed).abs().max() < TOLERANCE


def test_tensors_that_nothing_reads_are_refused_and_heads_are_not(tmp_path):
    save("bert", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert any(name.startswith("pooler.") for name in tensors)
    save_file({f"bert.{name}": tensor for name, tensor in tensors.items()}, file)
    load(tmp_path)
    save_file({**tensors, "encoder.layer.0.adapter.weight": torch.ones(2)}, file)
    with pytest.raises(ConfigurationError, match=r"adapter\.weight"):
        load(tmp_path)
    tensors.pop("encoder.layer.2.output.dense.bias")
    save_file(tensors, file)
    with pytest.raises(ConfigurationError, match=r"output\.dense\.bias is missing"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"hidden_act": "silu"}, "silu"),
        ({"is_decoder": True}, "is_decoder"),
        ({"num_attention_heads": 5}, "multiple"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path, change, told):
    raw = {"architectures": ["BertModel"], **FAMILIES["bert"][1].to_diff_dict(), **SIZES}
    raw = {**FAMILIES["bert"][1].to_dict(), **raw, **change}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigurationError, match=told):
        EncoderConfig.from_pretrained(tmp_path)


def test_limits_are_told_with_both_numbers_and_decoders_keep_theirs(tmp_path):
    save("bert", tmp_path)
    with pytest.raises(ConfigurationError, match="max_model_len 67 exceeds the model's 66"):
        EncoderConfig.from_pretrained(tmp_path, max_model_len=67)
    with pytest.raises(ConfigurationError, match="BertModel is an encoder"):
        ModelConfig.from_pretrained(tmp_path)
