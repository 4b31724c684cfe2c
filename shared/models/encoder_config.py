"""An encoder checkpoint's architecture as one typed value, read from its config.json. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from shared.errors import ConfigurationError
from shared.models.config import ENCODER_ARCHITECTURES, read_json_object

ActivationName = Literal["gelu", "gelu_tanh", "relu"]

_ACTIVATIONS: dict[str, ActivationName] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """A BERT, RoBERTa or XLM-RoBERTa.

    Attributes:
        architecture: One of `ENCODER_ARCHITECTURES`.
        num_positions: Rows of the position embedding.
        first_position: Of an input's first token; RoBERTa's come after the padding token's id.
        max_model_len: Tokens of an input at most.
        num_token_types: Rows of the token type embedding; every token of an input is of type 0.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_positions: int
    first_position: int
    max_model_len: int
    num_token_types: int
    layer_norm_eps: float
    activation: ActivationName

    @property
    def head_dim(self) -> int:
        """Of each attention head."""
        return self.hidden_size // self.num_heads

    @classmethod
    def from_pretrained(cls, directory: Path, *, max_model_len: int = 0) -> Self:
        """Reads config.json.

        Args:
            directory: Of a Hugging Face checkpoint.
            max_model_len: Limits inputs below the model's own length; 0 for the model's.

        Raises:
            ConfigurationError: No config.json, not JSON, a field missing or of the wrong type, a feature that is not
                supported, or `max_model_len` above the model's.
        """
        path = directory / "config.json"
        raw = read_json_object(path)
        try:
            return cls._from_raw(raw, max_model_len)
        except (KeyError, TypeError, ValueError) as exc:
            reason = f"no field {exc}" if isinstance(exc, KeyError) else str(exc)
            raise ConfigurationError(f"{path}: {reason}") from exc

    @classmethod
    def _from_raw(cls, raw: dict[str, Any], wanted_len: int) -> Self:
        architecture = _architecture(raw)
        _refuse_unsupported(raw)
        num_positions, hidden_size = int(raw["max_position_embeddings"]), int(raw["hidden_size"])
        num_heads = int(raw["num_attention_heads"])
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
        first_position = 0 if architecture.startswith("Bert") else int(raw["pad_token_id"]) + 1
        own_len = num_positions - first_position
        if wanted_len > own_len:
            raise ValueError(f"max_model_len {wanted_len} exceeds the model's {own_len} positions")
        return cls(
            architecture=architecture,
            vocab_size=int(raw["vocab_size"]),
            hidden_size=hidden_size,
            intermediate_size=int(raw["intermediate_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=num_heads,
            num_positions=num_positions,
            first_position=first_position,
            max_model_len=wanted_len or own_len,
            num_token_types=int(raw["type_vocab_size"]),
            layer_norm_eps=float(raw["layer_norm_eps"]),
            activation=_ACTIVATIONS[raw["hidden_act"]],
        )


def is_encoder(directory: Path) -> bool:
    """Whether a checkpoint embeds texts and generates none.

    Raises:
        ConfigurationError: No config.json, or not JSON.
    """
    names = read_json_object(directory / "config.json").get("architectures") or [""]
    return names[0] in ENCODER_ARCHITECTURES


def _architecture(raw: dict[str, Any]) -> str:
    name = str((raw.get("architectures") or [""])[0])
    if name not in ENCODER_ARCHITECTURES:
        raise ValueError(f"architecture {name!r} is no encoder; supported: {', '.join(ENCODER_ARCHITECTURES)}")
    return name


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    if raw.get("quantization_config"):
        raise ValueError("quantized checkpoints of encoders are not supported")
    if raw.get("is_decoder") or raw.get("add_cross_attention"):
        raise ValueError("is_decoder and add_cross_attention are not supported")
    if (positions := raw.get("position_embedding_type", "absolute")) != "absolute":
        raise ValueError(f"position_embedding_type {positions!r} is not supported; supported: absolute")
    if (activation := raw["hidden_act"]) not in _ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
