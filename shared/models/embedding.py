"""How a checkpoint wants its hidden states made into vectors: sentence-transformers' files. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from shared.errors import ConfigurationError

PoolingName = Literal["last", "mean", "cls"]

_MODES: dict[str, PoolingName] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}
_NAMES: dict[str, PoolingName] = {"lasttoken": "last", "last": "last", "mean": "mean", "cls": "cls"}


@dataclass(frozen=True, slots=True)
class EmbeddingConfig:
    """Pooling and what follows it.

    Attributes:
        size: Of the whole vector: the model's hidden size.
        normalize: To length 1. True unless a sentence-transformers configuration leaves it out.
        dimensions: The sizes that vectors may be cut to (Matryoshka); None = none, () = any.
        max_tokens: Of an input, as the checkpoint wants it; 0 = the model's own limit.
    """

    size: int
    pooling: PoolingName
    normalize: bool
    dimensions: tuple[int, ...] | None
    max_tokens: int = 0

    @classmethod
    def from_pretrained(cls, directory: Path, pooling: str = "auto", default: PoolingName = "last") -> Self:
        """Reads `modules.json` and what it names, and Matryoshka's fields of `config.json`.

        Args:
            directory: Of a checkpoint.
            pooling: Wins over the files unless it is "auto".
            default: Where neither says.

        Raises:
            ConfigurationError: A file is broken, or asks for a pooling or a module that is not supported.
        """
        config = _json(directory / "config.json", {})
        modules = _json(directory / "modules.json", [])
        kinds = {str(m["type"]).rpartition(".")[2]: directory / str(m.get("path", "")) for m in modules}
        for kind in kinds.keys() - {"Transformer", "Pooling", "Normalize"}:
            raise ConfigurationError(f"{directory}: sentence-transformers module {kind} is not supported")
        named = _pooling_of(kinds["Pooling"] / "config.json") if "Pooling" in kinds else default
        lengths = _json(directory / "sentence_bert_config.json", {})
        return cls(
            size=int(config["hidden_size"]),
            pooling=named if pooling == "auto" else _NAMES[pooling],
            normalize="Normalize" in kinds if modules else True,
            dimensions=_dimensions(config),
            max_tokens=int(lengths.get("max_seq_length") or 0),
        )


def _pooling_of(path: Path) -> PoolingName:
    config = _json(path, {})
    if mode := config.get("pooling_mode"):
        chosen = [_NAMES[mode]] if mode in _NAMES else []
    else:
        chosen = [name for field, name in _MODES.items() if config.get(field)]
    others = [f for f, on in config.items() if f.startswith("pooling_mode_") and on is True and f not in _MODES]
    if len(chosen) != 1 or others:
        raise ConfigurationError(f"{path}: one of the poolings cls, mean and last token is supported")
    return chosen[0]


def _dimensions(config: dict[str, Any]) -> tuple[int, ...] | None:
    if sizes := config.get("matryoshka_dimensions"):
        return tuple(sorted(int(size) for size in sizes))
    return () if config.get("is_matryoshka") else None


def _json(path: Path, default: Any) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default
    except (OSError, ValueError) as exc:
        raise ConfigurationError(f"{path}: cannot be read as JSON: {exc}") from exc
    if type(content) is not type(default):
        raise ConfigurationError(f"{path}: a JSON {'list' if default == [] else 'object'} is expected")
    return content
