"""BERT's forward pass over packed inputs: no padding is computed, and no input sees another.

Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from shared.models.encoder_config import ActivationName, EncoderConfig

_ACTIVATIONS: dict[ActivationName, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


class Affine(NamedTuple):
    """Weight and bias of a projection (`[out, in]`, `[out]`) or of a layer norm (`[hidden]` both)."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    """One layer; norms come after the residual sums.

    Attributes:
        qkv: Query, key and value projections, one below the other.
    """

    qkv: Affine
    output: Affine
    attention_norm: Affine
    up: Affine
    down: Affine
    feed_forward_norm: Affine


@dataclass(frozen=True, slots=True)
class EncoderEmbeddings:
    """What a token starts as: the sum of the three, normalized.

    Attributes:
        words: `[vocab, hidden]`.
        positions: `[positions, hidden]`.
        token_type: `[hidden]`, of type 0.
    """

    words: Tensor
    positions: Tensor
    token_type: Tensor
    norm: Affine


class Encoder:
    """Immutable; one thread at a time, for speed only."""

    def __init__(self, config: EncoderConfig, embeddings: EncoderEmbeddings, layers: Sequence[EncoderLayer]) -> None:
        self.config = config
        self._embeddings = embeddings
        self._layers = layers
        self._activation = _ACTIVATIONS[config.activation]

    @torch.inference_mode()
    def forward(self, inputs: Sequence[Sequence[int]]) -> list[Tensor]:
        """Final hidden states.

        Args:
            inputs: Token ids below `vocab_size`; each has 1 to `max_model_len`.

        Returns:
            Per input `[tokens, hidden]`, in the dtype of the weights.
        """
        lengths = [len(token_ids) for token_ids in inputs]
        states = self._embed(inputs, lengths)
        for layer in self._layers:
            attended = functional.linear(self._attend(states, layer, lengths), *layer.output)
            states = self._norm(states + attended, layer.attention_norm)
            fed = functional.linear(self._activation(functional.linear(states, *layer.up)), *layer.down)
            states = self._norm(states + fed, layer.feed_forward_norm)
        return list(torch.split(states, lengths))

    def _embed(self, inputs: Sequence[Sequence[int]], lengths: list[int]) -> Tensor:
        """`[tokens of all inputs, hidden]`."""
        table, first = self._embeddings, self.config.first_position
        token_ids = torch.tensor([token_id for item in inputs for token_id in item])
        positions = torch.cat([torch.arange(first, first + length) for length in lengths])
        states = table.words[token_ids] + table.positions[positions] + table.token_type
        return self._norm(states, table.norm)

    def _attend(self, states: Tensor, layer: EncoderLayer, lengths: list[int]) -> Tensor:
        """Every token of an input attends to every token of it; `[tokens of all inputs, hidden]`."""
        config = self.config
        qkv = functional.linear(states, *layer.qkv).view(-1, 3, config.num_heads, config.head_dim)
        mixed = []
        for packed in torch.split(qkv, lengths):
            query, key, value = packed.permute(1, 2, 0, 3)  # each [heads, tokens, head_dim]
            mixed.append(
                functional.scaled_dot_product_attention(query[None], key[None], value[None])[0].transpose(0, 1)
            )
        return torch.cat(mixed).reshape(-1, config.hidden_size)

    def _norm(self, states: Tensor, norm: Affine) -> Tensor:
        return functional.layer_norm(states, (self.config.hidden_size,), *norm, self.config.layer_norm_eps)
