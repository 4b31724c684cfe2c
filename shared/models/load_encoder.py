"""Builds an `Encoder` from a checkpoint, saved as the bare model or with heads on it."""

from __future__ import annotations

from pathlib import Path

import torch

from shared.errors import ConfigurationError
from shared.models.encoder import Affine, Encoder, EncoderEmbeddings, EncoderLayer
from shared.models.encoder_config import EncoderConfig
from shared.models.weights import Checkpoint, Progress

PREFIXES = ("bert.", "roberta.")
"""Of the body's tensors in checkpoints that have heads beside it."""

IGNORED_TENSORS = ("pooler.", "cls.", "lm_head.")
"""Heads: they come after the hidden states that are pooled."""

_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
"""That old checkpoints carry and are computed here."""


def load_encoder(
    directory: Path, config: EncoderConfig, *, dtype: torch.dtype, progress: Progress | None = None
) -> Encoder:
    """Loads a model into host memory.

    Args:
        directory: The checkpoint.
        config: Of the same checkpoint.
        dtype: To compute in; weights stored otherwise are cast.
        progress: Called with bytes read and bytes in all; heads are not read, so it may end short of the latter.

    Raises:
        ConfigurationError: A tensor is missing, of another shape, or belongs to no part of the architecture.
    """
    with Checkpoint(directory, progress) as checkpoint:
        return _Loader(checkpoint, config, dtype).encoder()


class _Loader:
    """Reads one checkpoint; vanishes when the encoder stands."""

    def __init__(self, checkpoint: Checkpoint, config: EncoderConfig, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._dtype = dtype
        names = checkpoint.unused()
        self._prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in names)), "")

    def encoder(self) -> Encoder:
        config, hidden = self._config, self._config.hidden_size
        token_types = self._tensor("embeddings.token_type_embeddings.weight", (config.num_token_types, hidden))
        embeddings = EncoderEmbeddings(
            words=self._tensor("embeddings.word_embeddings.weight", (config.vocab_size, hidden)),
            positions=self._tensor("embeddings.position_embeddings.weight", (config.num_positions, hidden)),
            token_type=token_types[0],
            norm=self._norm("embeddings.LayerNorm"),
        )
        layers = [self._layer(f"encoder.layer.{index}.") for index in range(config.num_layers)]
        self._refuse_unknown()
        return Encoder(config, embeddings, layers)

    def _layer(self, prefix: str) -> EncoderLayer:
        hidden, intermediate = self._config.hidden_size, self._config.intermediate_size
        projections = [
            self._affine(f"{prefix}attention.self.{name}", hidden, hidden) for name in ("query", "key", "value")
        ]
        return EncoderLayer(
            qkv=Affine(torch.cat([p.weight for p in projections]), torch.cat([p.bias for p in projections])),
            output=self._affine(f"{prefix}attention.output.dense", hidden, hidden),
            attention_norm=self._norm(f"{prefix}attention.output.LayerNorm"),
            up=self._affine(f"{prefix}intermediate.dense", intermediate, hidden),
            down=self._affine(f"{prefix}output.dense", hidden, intermediate),
            feed_forward_norm=self._norm(f"{prefix}output.LayerNorm"),
        )

    def _affine(self, name: str, outputs: int, inputs: int) -> Affine:
        return Affine(self._tensor(f"{name}.weight", (outputs, inputs)), self._tensor(f"{name}.bias", (outputs,)))

    def _norm(self, name: str) -> Affine:
        shape = (self._config.hidden_size,)
        return Affine(self._tensor(f"{name}.weight", shape), self._tensor(f"{name}.bias", shape))

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._checkpoint.tensor(self._prefix + name, shape).to(self._dtype)

    def _refuse_unknown(self) -> None:
        """A tensor that nothing reads means weights that would be left out of the arithmetic."""
        ignored = (*IGNORED_TENSORS, *_BUFFERS)
        unknown = [n for n in self._checkpoint.unused() if not n.removeprefix(self._prefix).startswith(ignored)]
        if unknown:
            shown = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
            raise ConfigurationError(
                f"{self._checkpoint.directory}: {len(unknown)} tensors that {self._config.architecture} "
                f"does not use: {shown}"
            )
