"""The decoder-only transformer of Llama, Mistral, Qwen2 and Qwen3: one class, the differences are data.

    tokens -> embedding -> [ norm -> qkv -> (q, k norms) -> rotary_write_kv -> paged_attention -> output
                             norm -> gate, up -> silu_and_mul -> down ] x layers -> norm -> LM head

Plain objects rather than `nn.Module`: at a decode step's size the module machinery would cost more than the arithmetic.
Runs on any device that its backend runs on.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.backend import Backend
from kernels.dense_linear import Linear
from shared.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """The flat tensors of one step, on the model's device; valid for one forward pass (the runner reuses the memory).

    Attributes:
        token_ids: int64 `[T]`.
        positions: int64 `[T]`, index of each token in its sequence.
        slot_mapping: int64 `[T]`, cache slot of each token.
        block_tables: int32 `[S, max_blocks]`.
        query_start: int32 `[S + 1]`.
        seq_lens: int32 `[S]`, tokens of each sequence including this step's.
        max_query_len: Longest run of `query_start`.
        max_seq_len: Largest of `seq_lens`.
        unwanted: Made other than 0 by another thread once nobody wants the step any more; a model that looks ends it
            early. None = it is always wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    max_query_len: int
    max_seq_len: int
    unwanted: ctypes.c_int32 | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; projections of equal input are fused.

    Attributes:
        qkv: `[(num_heads + 2 * num_kv_heads) * head_dim, hidden]`: queries, keys, values.
        gate_up: `[2 * intermediate, hidden]`.
        query_norm, key_norm: `[head_dim]`, None where the architecture has none.
    """

    attention_norm: torch.Tensor
    qkv: Linear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: Linear
    feed_forward_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """A loaded model. Stateless between calls: KV lives in the cache that is passed in.

    Attributes:
        config: As loaded, `max_model_len` included.
        dtype: Of weights and activations.
        device: Of all tensors.
        has_lm_head: False where the model was loaded without one: `logits` is then not available.
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        *,
        embedding: torch.Tensor,  # [vocab, hidden]
        layers: list[LayerWeights],
        final_norm: torch.Tensor,  # [hidden]
        lm_head: Linear | None,  # [vocab, hidden]
    ) -> None:
        self.config = config
        self.backend = backend
        self.dtype = embedding.dtype
        self.device = embedding.device
        self.has_lm_head = lm_head is not None
        self._embedding = embedding
        self._layers = layers
        self._final_norm = final_norm
        self._lm_head = lm_head
        self._cos_sin = _cos_sin_table(config).to(self.device)
        self._scale = config.head_dim**-0.5
        self._head_counts = [config.num_heads, config.num_kv_heads, config.num_kv_heads]

    def forward(self, inputs: ForwardInputs, kv_layers: list[torch.Tensor]) -> torch.Tensor:
        """Computes the step's tokens and stores their keys and values.

        Args:
            inputs: The step.
            kv_layers: Per layer `[num_blocks, 2, block_size, num_kv_heads, head_dim]`; mutated.

        Returns:
            `[T, hidden]`, before the final norm; for `logits`.
        """
        ops, eps = self.backend.ops, self.config.rms_norm_eps
        residual = F.embedding(inputs.token_ids, self._embedding)
        normed = ops.rms_norm(residual, self._layers[0].attention_norm, eps)
        last = len(self._layers) - 1
        for index, (layer, kv_cache) in enumerate(zip(self._layers, kv_layers, strict=True)):
            attended = self._attention(layer, normed, inputs, kv_cache)
            normed, residual = ops.fused_add_rms_norm(attended, residual, layer.feed_forward_norm, eps)
            out = layer.down(ops.silu_and_mul(layer.gate_up(normed)))
            if index == last:
                break
            normed, residual = ops.fused_add_rms_norm(out, residual, self._layers[index + 1].attention_norm, eps)
        return out + residual

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and LM head of the rows that sample: `[R, hidden]` -> `[R, vocab]`, the model's dtype."""
        if self._lm_head is None:
            raise RuntimeError("the model was loaded without its LM head")
        return self._lm_head(self.backend.ops.rms_norm(hidden, self._final_norm, self.config.rms_norm_eps))

    def normalized(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm of rows that are pooled: `[R, hidden]` -> float32 `[R, hidden]`."""
        rows = hidden.float()
        scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return rows * scale * self._final_norm.float()

    def _attention(
        self, layer: LayerWeights, normed: torch.Tensor, inputs: ForwardInputs, kv_cache: torch.Tensor
    ) -> torch.Tensor:
        """`[T, hidden]` -> `[T, hidden]`."""
        ops, config = self.backend.ops, self.config
        num_tokens = normed.shape[0]
        heads = layer.qkv(normed).view(num_tokens, -1, config.head_dim)
        query, key, value = torch.split(heads, self._head_counts, dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            query = _norm_heads(self.backend, query, layer.query_norm, config.rms_norm_eps)
            key = _norm_heads(self.backend, key, layer.key_norm, config.rms_norm_eps)
        ops.rotary_write_kv(query, key, value, inputs.positions, self._cos_sin, kv_cache, inputs.slot_mapping)
        attended = ops.paged_attention(
            query,
            kv_cache,
            inputs.block_tables,
            inputs.query_start,
            inputs.seq_lens,
            scale=self._scale,
            max_query_len=inputs.max_query_len,
            max_seq_len=inputs.max_seq_len,
        )
        return layer.output(attended.view(num_tokens, -1))


def _norm_heads(backend: Backend, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalises each head of `[T, heads, D]`; the result is contiguous."""
    return backend.ops.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)


def _cos_sin_table(config: ModelConfig) -> torch.Tensor:
    """float32 `[max_model_len, head_dim]`: cosines, then sines."""
    frequencies = torch.from_numpy(config.rope.inverse_frequencies(config.head_dim))
    angles = torch.outer(
        torch.arange(config.max_model_len, dtype=torch.float32, device=frequencies.device), frequencies
    )
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
