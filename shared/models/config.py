"""A checkpoint's architecture as one typed value, read from its config.json. Imports no torch: gateways read it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from shared.errors import ConfigurationError
from shared.models.rope import RopeScaling, read_rope

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ENCODER_ARCHITECTURES = (
    "BertModel",
    "BertForMaskedLM",
    "BertForPreTraining",
    "RobertaModel",
    "RobertaForMaskedLM",
    "XLMRobertaModel",
    "XLMRobertaForMaskedLM",
)
"""Those that embed texts and generate none: `EncoderConfig` reads them."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that the decoder, the cache and the gateway need to know of a model.

    Attributes:
        architecture: One of `SUPPORTED_ARCHITECTURES`.
        vocab_size: Rows of the embedding, token ids are below it; may exceed the tokenizer's vocabulary.
        num_heads, num_kv_heads: Query heads and key/value heads; the former is a multiple of the latter.
        max_model_len: Positions that the model may use, prompt and output together.
        qkv_bias, output_bias: Whether the projections into and out of attention have biases.
        mlp_bias: Whether the feed-forward projections have.
        qk_norm: Queries and keys are normalised per head before rotation (Qwen3).
        tie_word_embeddings: The LM head is the embedding.
        eos_token_ids: Tokens that end a sequence.
        checkpoint_dtype: In which the weights were published, "float32" if unsaid.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeScaling
    max_model_len: int
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    checkpoint_dtype: str

    @classmethod
    def from_pretrained(cls, directory: Path, *, max_model_len: int = 0) -> Self:
        """Reads config.json and, if there, generation_config.json.

        Args:
            directory: Of a Hugging Face checkpoint.
            max_model_len: Limits the context below the model's own; 0 for the model's.

        Raises:
            ConfigurationError: No config.json, not JSON, a field missing or of the wrong type, an architecture or a
                feature that is not supported, or `max_model_len` above the model's.
        """
        raw = read_json_object(directory / "config.json")
        try:
            return cls._from_raw(raw, _eos_token_ids(directory, raw), max_model_len, directory)
        except (KeyError, TypeError, ValueError) as exc:
            reason = f"no field {exc}" if isinstance(exc, KeyError) else str(exc)
            raise ConfigurationError(f"{directory / 'config.json'}: {reason}") from exc

    @classmethod
    def _from_raw(cls, raw: dict[str, Any], eos: tuple[int, ...], max_model_len: int, directory: Path) -> Self:
        architecture = _architecture(raw, directory)
        _refuse_unsupported(raw, directory)
        attention_bias = bool(raw.get("attention_bias", False))
        num_heads, hidden_size = int(raw["num_attention_heads"]), int(raw["hidden_size"])
        num_kv_heads = int(raw.get("num_key_value_heads") or num_heads)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
        max_positions = int(raw["max_position_embeddings"])
        return cls(
            architecture=architecture,
            vocab_size=int(raw["vocab_size"]),
            hidden_size=hidden_size,
            intermediate_size=int(raw["intermediate_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=int(raw.get("head_dim") or hidden_size // num_heads),
            rms_norm_eps=float(raw["rms_norm_eps"]),
            rope=read_rope(raw, max_positions),
            max_model_len=_context_length(raw, architecture, max_positions, max_model_len, directory),
            qkv_bias=architecture == "Qwen2ForCausalLM" or attention_bias,
            output_bias=attention_bias and architecture != "Qwen2ForCausalLM",
            mlp_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=architecture == "Qwen3ForCausalLM",
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            eos_token_ids=eos,
            checkpoint_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        )


def resolve_dtype(name: str, device_type: str) -> str:
    """The element type to compute and cache in.

    "auto" is bfloat16 on a GPU and float32 on a CPU: there numerics come first, and not every CPU has instructions for
    bfloat16. On one that has, "bfloat16" halves the time of the matrix products.

    Args:
        name: "auto" or one of `DTYPES`.
        device_type: "cpu", "cuda", ...

    Raises:
        ConfigurationError: No such dtype.
    """
    if name == "auto":
        return "float32" if device_type == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise ConfigurationError(f"unknown dtype {name!r}; known: auto, {', '.join(DTYPES)}")
    return name


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a checkpoint's file.

    Raises:
        ConfigurationError: No such file, or no JSON object in it.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ConfigurationError(f"no {path.name} in {path.parent}: not a Hugging Face checkpoint") from exc
    except (OSError, ValueError) as exc:
        raise ConfigurationError(f"{path}: cannot be read as JSON: {exc}") from exc
    if not isinstance(raw, dict):
        raise ConfigurationError(f"{path}: a JSON object is expected, not {type(raw).__name__}")
    return raw


def _architecture(raw: dict[str, Any], directory: Path) -> str:
    names = raw.get("architectures") or [f"model_type {raw.get('model_type')!r}"]
    if names[0] in ENCODER_ARCHITECTURES:
        raise ConfigurationError(
            f"{directory}: {names[0]} is an encoder: it generates nothing, decode workers serve it"
        )
    if names[0] not in SUPPORTED_ARCHITECTURES:
        supported = ", ".join((*SUPPORTED_ARCHITECTURES, *ENCODER_ARCHITECTURES))
        raise ConfigurationError(f"{directory}: architecture {names[0]} is not supported; supported: {supported}")
    return str(names[0])


def _refuse_unsupported(raw: dict[str, Any], directory: Path) -> None:
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown method")
        raise ConfigurationError(f"{directory}: quantized checkpoints ({method}) are not supported")
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigurationError(f"{directory}: activation {activation!r} is not supported; supported: silu")


def _context_length(raw: dict[str, Any], architecture: str, max_positions: int, wanted: int, directory: Path) -> int:
    """The smaller of the model's and the wanted length; refuses one at which a sliding window would change results."""
    if wanted > max_positions:
        raise ConfigurationError(f"{directory}: max_model_len {wanted} exceeds the model's {max_positions} positions")
    length = wanted or max_positions
    slides = architecture == "MistralForCausalLM" or bool(raw.get("use_sliding_window", False))
    window = raw.get("sliding_window") if slides else None
    if window is not None and length > int(window):
        raise ConfigurationError(
            f"{directory}: sliding-window attention over {window} tokens is not supported; "
            f"set max_model_len to at most {window} (now {length})"
        )
    return length


def _eos_token_ids(directory: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    """Those of generation_config.json if it names any, as in transformers' generate; else config.json's."""
    generation = directory / "generation_config.json"
    value = read_json_object(generation).get("eos_token_id") if generation.exists() else None
    if value is None:
        value = raw.get("eos_token_id")
    if value is None:
        return ()
    return tuple(int(token) for token in value) if isinstance(value, list) else (int(value),)
