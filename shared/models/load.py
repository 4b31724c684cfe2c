"""Builds a `Decoder` from a checkpoint: reads, casts, fuses, hands each weight to the backend."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from kernels.backend import Backend
from kernels.dense_linear import Linear
from shared.errors import ConfigurationError
from shared.models.config import ModelConfig
from shared.models.decoder import Decoder, LayerWeights
from shared.models.native_decoder import NativeDecoder
from shared.models.native_weights import NativeWeights, ReadWeight
from shared.models.weights import Checkpoint, Progress

_Make = Callable[[tuple[int, int], ReadWeight], Linear]
"""Makes a matrix multiplication of a shape `(out, in)`."""

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

IGNORED_TENSORS = ("rotary_emb.inv_freq",)
"""Suffixes of what old checkpoints carry and is computed here."""


def load_decoder(
    directory: Path,
    config: ModelConfig,
    *,
    dtype: str,
    device: torch.device,
    backend: Backend,
    with_lm_head: bool = True,
    progress: Progress | None = None,
    share_weights_in: Path | None = None,
) -> Decoder:
    """Loads a model.

    Args:
        directory: The checkpoint.
        config: Of the same checkpoint.
        dtype: From `resolve_dtype`; weights stored otherwise are cast.
        device: Where weights and activations live.
        backend: Whose kernels run it.
        with_lm_head: False for a worker that samples nothing: the head is neither read nor kept.
        progress: Called with bytes read and bytes in all; when the head is skipped it ends short of the latter.
        share_weights_in: A directory in shared memory, where workers of one machine keep one packed copy; native
            backend only.

    Raises:
        ConfigurationError: A tensor is missing, of another shape, or belongs to no part of the architecture.
    """
    with Checkpoint(directory, progress) as checkpoint:
        torch_dtype = TORCH_DTYPES[dtype]
        native = None
        if backend.library is not None:
            native = NativeWeights(backend.library, directory, torch_dtype, share_weights_in)
        return _Loader(checkpoint, config, torch_dtype, device, backend, native).decoder(with_lm_head)


def _layer_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """`(out, in)` of a layer's fused products, in the order in which they are made."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    query_width = config.num_heads * config.head_dim
    qkv_width = query_width + 2 * config.num_kv_heads * config.head_dim
    return [(qkv_width, hidden), (hidden, query_width), (2 * intermediate, hidden), (hidden, intermediate)]


class _Loader:
    """Reads one checkpoint; vanishes when the decoder stands."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
        native: NativeWeights | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._dtype = dtype
        self._device = device
        self._backend = backend
        self._native = native

    def decoder(self, with_lm_head: bool) -> Decoder:
        config = self._config
        vocab_shape = (config.vocab_size, config.hidden_size)
        embedding = self._tensor("model.embed_tokens.weight", vocab_shape)
        with self._body() as make_linear:
            layers = [self._layer(f"model.layers.{i}.", make_linear) for i in range(config.num_layers)]
        final_norm = self._tensor("model.norm.weight", (config.hidden_size,))
        lm_head = None
        if with_lm_head:
            weight = embedding if config.tie_word_embeddings else self._tensor("lm_head.weight", vocab_shape)
            with self._head(vocab_shape) as make_linear:
                lm_head = make_linear(vocab_shape, lambda: (weight, None))
        self._refuse_unknown()
        make = Decoder if self._backend.library is None else NativeDecoder
        return make(config, self._backend, embedding=embedding, layers=layers, final_norm=final_norm, lm_head=lm_head)

    def _body(self) -> AbstractContextManager[_Make]:
        """Makes the products of the layers, which come in the order of `_layer_shapes`."""
        if self._native is None:
            return nullcontext(lambda shape, read: self._backend.linear(*read()))
        shapes = _layer_shapes(self._config) * self._config.num_layers
        return self._native.part("body", self._backend.quantization, shapes)

    def _head(self, shape: tuple[int, int]) -> AbstractContextManager[_Make]:
        if self._native is None:
            return nullcontext(lambda shape, read: self._backend.head(*read()))
        return self._native.part("head", self._backend.quantization.of_lm_head, [shape])

    def _layer(self, prefix: str, make_linear: _Make) -> LayerWeights:
        config = self._config
        hidden, intermediate = config.hidden_size, config.intermediate_size
        query_width, key_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        qkv = {f"{attention}q_proj": query_width, f"{attention}k_proj": key_width, f"{attention}v_proj": key_width}
        gate_up = {f"{mlp}gate_proj": intermediate, f"{mlp}up_proj": intermediate}
        norms = [
            self._tensor(f"{attention}{name}_norm.weight", (config.head_dim,)) if config.qk_norm else None
            for name in ("q", "k")
        ]
        fused = [
            self._fused(make_linear, qkv, hidden, bias=config.qkv_bias),
            self._fused(make_linear, {f"{attention}o_proj": hidden}, query_width, bias=config.output_bias),
            self._fused(make_linear, gate_up, hidden, bias=config.mlp_bias),
            self._fused(make_linear, {f"{mlp}down_proj": hidden}, intermediate, bias=config.mlp_bias),
        ]
        return LayerWeights(
            attention_norm=self._tensor(f"{prefix}input_layernorm.weight", (hidden,)),
            qkv=fused[0],
            query_norm=norms[0],
            key_norm=norms[1],
            output=fused[1],
            feed_forward_norm=self._tensor(f"{prefix}post_attention_layernorm.weight", (hidden,)),
            gate_up=fused[2],
            down=fused[3],
        )

    def _fused(self, make_linear: _Make, outputs: dict[str, int], inputs: int, *, bias: bool) -> Linear:
        """One matrix multiplication for projections (name: width) of the same input."""
        weights = [self._checkpoint.tensor(f"{name}.weight", (width, inputs)) for name, width in outputs.items()]
        biases = [self._checkpoint.tensor(f"{name}.bias", (width,)) for name, width in outputs.items() if bias]

        def read() -> tuple[torch.Tensor, torch.Tensor | None]:
            return self._cast(weights), self._cast(biases) if biases else None

        return make_linear((sum(outputs.values()), inputs), read)

    def _cast(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """One tensor of all, where the model lives; what is mapped is read here."""
        cast = [part.to(device=self._device, dtype=self._dtype) for part in parts]
        return cast[0] if len(cast) == 1 else torch.cat(cast)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._checkpoint.tensor(name, shape).to(device=self._device, dtype=self._dtype)

    def _refuse_unknown(self) -> None:
        """A tensor that nothing reads means weights that would be left out of the arithmetic."""
        unknown = [
            name
            for name in self._checkpoint.unused()
            if name != "lm_head.weight" and not name.endswith(IGNORED_TENSORS)
        ]
        if unknown:
            shown = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
            raise ConfigurationError(
                f"{self._checkpoint.directory}: {len(unknown)} tensors that {self._config.architecture} "
                f"does not use: {shown}"
            )
