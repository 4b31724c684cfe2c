"""The decoder with all layers of a step in one native call: same weights, same interface, one reduction order.

A sequence's logits then have the same bits alone, in any batch, with any chunking and any number of threads.
"""

from __future__ import annotations

import torch

from kernels.backend import Backend
from kernels.cpu.decoder_step import DecoderStep, NativeLayer
from kernels.cpu.packed_linear import NativeLinear
from kernels.cpu.token_generator import TokenGenerator
from kernels.dense_linear import Linear
from shared.models.config import ModelConfig
from shared.models.decoder import Decoder, ForwardInputs, LayerWeights


class NativeDecoder(Decoder):
    """See `Decoder`; the hidden states between `forward` and `logits` are float32 whatever the model's dtype."""

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        *,
        embedding: torch.Tensor,
        layers: list[LayerWeights],
        final_norm: torch.Tensor,
        lm_head: Linear | None,
    ) -> None:
        super().__init__(config, backend, embedding=embedding, layers=layers, final_norm=final_norm, lm_head=lm_head)
        assert backend.library is not None, "the backend computes no whole steps"
        self._library = backend.library
        self._final_norm_f32 = final_norm.float()
        self._step = DecoderStep(
            self._library,
            [_native_layer(layer) for layer in layers],
            embedding=embedding.contiguous(),
            cos_sin=self._cos_sin,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            eps=config.rms_norm_eps,
        )

    def forward(self, inputs: ForwardInputs, kv_layers: list[torch.Tensor]) -> torch.Tensor:
        """As in `Decoder`, float32.

        Raises:
            StepGivenUp: Nobody wanted it any more.
        """
        return self._step(
            inputs.token_ids,
            inputs.positions,
            inputs.slot_mapping,
            inputs.block_tables,
            inputs.query_start,
            inputs.seq_lens,
            kv_layers,
            inputs.unwanted,
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As in `Decoder`, float32."""
        if self._lm_head is None:
            raise RuntimeError("the model was loaded without its LM head")
        return _native_linear(self._lm_head).multiply(hidden, self._final_norm_f32, self.config.rms_norm_eps)

    def generator(
        self, kv_layers: list[torch.Tensor], *, max_rows: int, max_blocks: int, max_logprobs: int
    ) -> TokenGenerator:
        """Steps of sequences that decode, choice included, in one call over a cache as `forward` takes it.

        Args:
            kv_layers: Written by the steps.
            max_rows: Sequences at most.
            max_blocks: Of a sequence at most.
            max_logprobs: Likeliest tokens at most whose log-probabilities a sequence gets.
        """
        if self._lm_head is None:
            raise RuntimeError("the model was loaded without its LM head")
        return TokenGenerator(
            self._library,
            self._step,
            _native_linear(self._lm_head),
            self._final_norm_f32,
            self.config.rms_norm_eps,
            kv_layers,
            max_rows=max_rows,
            max_blocks=max_blocks,
            max_logprobs=max_logprobs,
        )


def _native_layer(layer: LayerWeights) -> NativeLayer:
    return NativeLayer(
        attention_norm=layer.attention_norm,
        qkv=_native_linear(layer.qkv),
        query_norm=layer.query_norm,
        key_norm=layer.key_norm,
        output=_native_linear(layer.output),
        feed_forward_norm=layer.feed_forward_norm,
        gate_up=_native_linear(layer.gate_up),
        down=_native_linear(layer.down),
    )


def _native_linear(linear: Linear) -> NativeLinear:
    assert isinstance(linear, NativeLinear), "the native backend packs every weight itself"
    return linear
