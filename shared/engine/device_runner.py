"""Runs steps on a device, two in flight: the host prepares and launches the next while the device computes the last.

    send inputs (one copy) -> replay the captured step -> tokens stay on the device -> copy them to the host -> event

A step that fits a captured shape is one launch; a larger one (long prompt chunks) is launched kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import structlog
import torch

from kernels import triton as ops
from kernels.triton.compile_watch import on_compile
from shared.engine.device_sampler import DeviceSampler, DrawKind, draw_kind
from shared.engine.device_step_inputs import DeviceStepInputs
from shared.engine.pooling import pool_step
from shared.engine.prompt_scores import score_prompts
from shared.engine.sampling_params import MAX_LOGPROBS
from shared.engine.step import BlockCopy, StepBatch, StepResult
from shared.engine.step_capture import CudaCapture, NoCapture, Replay, StepCapture
from shared.engine.step_shape import StepShape, StepShapes
from shared.identity import BlockId, SequenceId
from shared.kv_arena import KvLayout
from shared.models.decoder import Decoder

log = structlog.get_logger(__name__)

_MAX_IN_FLIGHT = 2


class LayeredCache(Protocol):
    """KV blocks on the model's device.

    Attributes:
        layout: Geometry of a block.
        tensor: All of them, contiguous, `[num_blocks, ...]`.
        layers: Per layer `[num_blocks, 2, block_size, num_kv_heads, head_dim]`.
    """

    layout: KvLayout
    tensor: torch.Tensor
    layers: list[torch.Tensor]


class _DeviceStep:
    """A launched step; its tokens are on the host once `event` is reached."""

    def __init__(self, tokens: torch.Tensor, event: torch.cuda.Event | None, read: StepResult) -> None:
        self._tokens = tokens
        self._event = event
        self._read = read

    def result(self) -> StepResult:
        if self._event is not None:
            self._event.synchronize()
        token_ids = self._tokens.tolist()
        return replace(self._read, token_ids=token_ids, logprobs=[None] * len(token_ids))


class _EditedStep:
    """A launched step whose tokens the host waited for already."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


class DeviceRunner:
    """A model over a KV cache on a device; a `PipelinedRunner`. Only the engine thread calls it.

    Args:
        model: Loaded, with the Triton backend; without its LM head it serves steps that sample nothing.
        kv_cache: Whose blocks the sequences' tables name; written by steps.
    """

    max_in_flight = _MAX_IN_FLIGHT

    def __init__(
        self,
        model: Decoder,
        kv_cache: LayeredCache,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_model_len: int,
        max_logprobs: int = MAX_LOGPROBS,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._max_batch_tokens = max_batch_tokens
        self._max_model_len = max_model_len
        self._shapes = StepShapes(
            max_batch_tokens=max_batch_tokens, max_sequences=max_sequences, max_model_len=max_model_len
        )
        self._max_sequences = max_sequences
        self._inputs = DeviceStepInputs(
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            max_blocks=-(-max_model_len // kv_cache.layout.block_size),
            block_size=kv_cache.layout.block_size,
            device=model.device,
            num_stages=_MAX_IN_FLIGHT + 1,
        )
        self._sampler = DeviceSampler(
            model.config.vocab_size,
            frozenset(model.config.eos_token_ids),
            max_sequences=max_sequences,
            max_logprobs=max_logprobs,
            device=model.device,
        )
        self._is_cuda = model.device.type == "cuda"
        self._host_tokens = [
            torch.zeros(max_sequences, dtype=torch.int64, pin_memory=self._is_cuda) for _ in range(_MAX_IN_FLIGHT + 1)
        ]
        self._captured: dict[StepShape, Replay] = {}
        self._sampled_rows: dict[SequenceId, int] = {}
        self._num_launched = 0

    @property
    def num_shapes(self) -> int:
        """Steps that `warm_up` captures."""
        return len(self._shapes.all())

    @torch.inference_mode()
    def launch(self, batch: StepBatch) -> _DeviceStep | _EditedStep:
        """See `PipelinedRunner`; on return the device works on the step."""
        is_read = any(item.sequence.pooling or item.sequence.is_scoring for item in batch.scheduled)
        shape = _exact_shape(batch) if is_read else self._shape_of(batch)
        self._inputs.send(batch, shape, self._sampled_rows)
        self._copy(batch.copies)
        replay = self._captured.get(shape)
        read = StepResult(token_ids=[], logprobs=[])
        if is_read:  # by the host, which waits for the device
            hidden = self._hidden(shape)
            read.pooled.extend(pool_step(hidden, batch, self._model.normalized))
            read.prompt_scores.extend(score_prompts(batch, hidden, self._model.logits))
            logits = self._draw(hidden, shape)
        else:
            logits = replay() if replay is not None else self._forward(shape)
        sequences = [item.sequence for item in batch.scheduled if item.samples]
        self._sampled_rows = {sequence.sequence_id: row for row, sequence in enumerate(sequences)}
        kind = draw_kind(sequences)
        if kind is DrawKind.EDITED:
            result = self._sampler.draw_edited(logits[: len(sequences)], sequences)
            return _EditedStep(replace(result, pooled=read.pooled, prompt_scores=read.prompt_scores))
        if kind is DrawKind.CUT:
            self._sampler.draw_cut(logits[: len(sequences)], self._inputs.draws)
        return self._bring_tokens(len(sequences), read)

    @torch.inference_mode()
    def run_largest(self) -> None:
        """One step of the largest size, of padding: for measuring what memory steps need."""
        shape = StepShape(self._max_batch_tokens, self._max_sequences, False, self._max_model_len)
        self._inputs.send(StepBatch([]), shape, {})
        self._forward(shape)

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """Compiles every kernel and captures every shape, so that nothing is compiled while serving.

        Args:
            progress: Called with (shapes done, shapes in all).
        """
        capture: StepCapture = CudaCapture(self._model.device) if self._is_cuda else NoCapture()
        shapes = self._shapes.all()
        on_compile(None)
        self.run_largest()
        for done, shape in enumerate(shapes, start=1):
            self._inputs.send(StepBatch([]), shape, {})
            self._captured[shape] = capture.capture(lambda shape=shape: self._forward(shape))  # type: ignore[misc]
            progress(done, len(shapes))
        self._copy([BlockCopy(BlockId(0), BlockId(0))])
        if self._model.has_lm_head:
            logits = self._captured[shapes[-1]]()
            self._sampler.draw_cut(logits, self._inputs.draws)
        if self._is_cuda:
            torch.cuda.synchronize()
        on_compile(_warn_of_compile)

    def _copy(self, copies: list[BlockCopy]) -> None:
        """In the device's order: after the steps launched before, and before this one writes."""
        if copies:
            sources, destinations = torch.tensor(copies, device=self._model.device).unbind(1)
            ops.copy_blocks(self._kv_cache.tensor, sources, destinations)

    def _shape_of(self, batch: StepBatch) -> StepShape:
        """A captured shape, or the batch's own."""
        exact, scheduled = _exact_shape(batch), batch.scheduled
        is_decode = exact.num_tokens == len(scheduled) and all(item.samples for item in scheduled)
        found = self._shapes.fit(exact.num_tokens, len(scheduled), exact.max_seq_len, is_decode=is_decode)
        return found or exact

    def _forward(self, shape: StepShape) -> torch.Tensor:
        """The step's work on the device: tokens, model, plain draws.

        Returns:
            Logits `[num_sequences, vocab]` of the rows that sample, then padding; without LM head the hidden states.
        """
        return self._draw(self._hidden(shape), shape)

    def _hidden(self, shape: StepShape) -> torch.Tensor:
        inputs = self._inputs.views(shape)
        ops.fill_pending(inputs.token_ids, self._inputs.sources[: shape.num_tokens], self._sampler.tokens)
        return self._model.forward(inputs, self._kv_cache.layers)

    def _draw(self, hidden: torch.Tensor, shape: StepShape) -> torch.Tensor:
        if not self._model.has_lm_head:
            return hidden
        if not shape.is_decode:
            hidden = hidden.index_select(0, self._inputs.sample_rows[: shape.num_sequences])
        logits = self._model.logits(hidden)
        self._sampler.draw(logits, self._inputs.draws)
        return logits

    def _bring_tokens(self, count: int, read: StepResult) -> _DeviceStep:
        self._num_launched += 1
        tokens = self._host_tokens[self._num_launched % len(self._host_tokens)][:count]
        tokens.copy_(self._sampler.tokens[:count], non_blocking=True)
        event = None
        if self._is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return _DeviceStep(tokens, event, read)


def _exact_shape(batch: StepBatch) -> StepShape:
    return StepShape(batch.num_tokens, len(batch.scheduled), False, max(item.end for item in batch.scheduled))


def _warn_of_compile(kernel: str) -> None:
    log.warning("compiled_while_serving", kernel=kernel)
