"""Runs one step: batch in, sampled tokens out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.cpu.decoder_step import StepGivenUp
from shared.engine.kv_cache import KvCache
from shared.engine.plain_decode import PlainDecode
from shared.engine.pooling import pool_step
from shared.engine.prompt_scores import score_prompts
from shared.engine.sampler import Sampler
from shared.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from shared.engine.sequence import Sequence
from shared.engine.step import BlockCopy, ScheduledSequence, StepBatch, StepResult
from shared.engine.step_inputs import PreparedStep, StepInputs, partly_written_blocks
from shared.identity import BlockHash, BlockId, SessionId
from shared.models.decoder import Decoder
from shared.models.native_decoder import NativeDecoder


class ModelRunner:
    """A model over a KV cache. Only the engine thread calls it; it reads sequences and never changes them."""

    def __init__(
        self,
        model: Decoder,
        kv_cache: KvCache,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_model_len: int,
        max_logprobs: int = MAX_LOGPROBS,
    ) -> None:
        """Allocates the step's buffers.

        Args:
            model: Loaded; without its LM head the runner serves steps that sample nothing.
            kv_cache: Whose blocks the sequences' tables name; written by steps.
            max_batch_tokens: Largest number of tokens in a step.
            max_sequences: Largest number of sequences in a step.
            max_model_len: Longest sequence.
            max_logprobs: Likeliest tokens returned at most.
        """
        self._model = model
        self._kv_cache = kv_cache
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self._max_model_len = max_model_len
        self._inputs = StepInputs(
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            max_blocks=-(-max_model_len // kv_cache.layout.block_size),
            block_size=kv_cache.layout.block_size,
            device=model.device,
        )
        self._sampler = Sampler(
            model.config.vocab_size,
            frozenset(model.config.eos_token_ids),
            max_logprobs=max_logprobs,
            device=model.device,
            library=model.backend.library,
        )
        self._plain: PlainDecode | None = None
        if isinstance(model, NativeDecoder) and model.has_lm_head:
            max_blocks = -(-max_model_len // kv_cache.layout.block_size)
            max_logprobs = min(max_logprobs, model.config.vocab_size)
            generator = model.generator(
                kv_cache.layers, max_rows=max_sequences, max_blocks=max_blocks, max_logprobs=max_logprobs
            )
            self._plain = PlainDecode(generator, max_logprobs)

    def execute(self, batch: StepBatch) -> StepResult:
        """Computes the batch's tokens, stores their KV, and samples for the sequences that reach their last token.

        Blocks until the tokens are known. On return the KV of every scheduled token is in the cache, unless the batch
        was unwanted and the step was given up.

        Args:
            batch: Within the limits given at construction; every sequence's block table covers its scheduled tokens.
        """
        if not batch.scheduled:
            return StepResult(token_ids=[], logprobs=[])
        self._copy(batch.copies)
        if self._plain is not None:
            if (result := self._plain.run(batch)) is not None:
                return result
            self._plain.forget()
        if self._model.backend.library is not None:
            return self._run(
                self._inputs.prepare(batch), batch
            )  # torch would track nothing: no weight wants a gradient
        with torch.inference_mode():
            step = self._inputs.prepare(batch)
            self._clear(partly_written_blocks(batch, self._kv_cache.layout.block_size))
            return self._run(step, batch)

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """Runs a few shapes, so that no user pays for first-time allocations; the cache stays as it is.

        Args:
            progress: Called with (shapes done, shapes in all).
        """
        chunk = min(self._max_batch_tokens, self._max_model_len)
        shapes = [(1, chunk), (1, 1), (min(2, self._max_sequences), 1), (min(8, self._max_sequences), 1)]
        for done, (num_sequences, query_len) in enumerate(shapes, start=1):
            batch = self._warm_up_batch(num_sequences, query_len)
            self._run(self._inputs.prepare(batch, store=False), batch)
            progress(done, len(shapes))

    def _run(self, step: PreparedStep, batch: StepBatch) -> StepResult:
        """Model and sampler."""
        all_sequences = [item.sequence for item in batch.scheduled]
        sequences = [item.sequence for item in batch.scheduled if item.samples]
        self._sampler.begin(sequences)
        try:
            hidden = self._model.forward(step.inputs, self._kv_cache.layers)
        except StepGivenUp:
            return StepResult(token_ids=[], logprobs=[], was_given_up=True)
        result = self._sample(step, hidden, sequences)
        if [s for s in all_sequences if s.num_prompt_logprobs is not None or s.pooling is not None]:
            self._look_at_prompts(batch, hidden, result)
        return result

    def _look_at_prompts(self, batch: StepBatch, hidden: torch.Tensor, result: StepResult) -> None:
        """Scores and pools what the step computed of prompts that ask for it."""
        if any(item.sequence.is_scoring for item in batch.scheduled):
            result.prompt_scores.extend(score_prompts(batch, hidden, self._model.logits))
        if any(item.sequence.pooling for item in batch.scheduled):
            result.pooled.extend(pool_step(hidden, batch, self._model.normalized))

    def _sample(self, step: PreparedStep, hidden: torch.Tensor, sequences: list[Sequence]) -> StepResult:
        """`sequences` are those that sample."""
        if not sequences:
            return StepResult(token_ids=[], logprobs=[])
        if len(sequences) < hidden.shape[0]:
            hidden = hidden.index_select(0, torch.tensor(step.sample_rows, device=hidden.device))
        return self._sampler.sample(self._model.logits(hidden), sequences)

    def _copy(self, copies: list[BlockCopy]) -> None:
        if copies:
            sources, destinations = torch.tensor(copies).unbind(1)
            self._model.backend.ops.copy_blocks(self._kv_cache.tensor, sources, destinations)

    def _clear(self, blocks: list[int]) -> None:
        """Zeroes blocks that a step fills in part.

        They may hold the bytes of a failed transfer, and attention multiplies what lies past a sequence's end by zero,
        which is harmless for finite numbers only. The native kernels do not look there.
        """
        for block in blocks:
            self._kv_cache.tensor[block].zero_()

    def _warm_up_batch(self, num_sequences: int, query_len: int) -> StepBatch:
        """Sequences of zeros over block 0, half of them greedy, half drawn with every cut."""
        samples = self._model.has_lm_head
        num_blocks = -(-query_len // self._kv_cache.layout.block_size)
        scheduled = []
        for index in range(num_sequences):
            params = SamplingParams(max_tokens=1, temperature=float(index % 2 == 0), top_p=0.9, num_logprobs=1)
            sequence = Sequence(
                session_id=SessionId("warm-up"),
                token_ids=[0] * query_len,
                num_prompt_tokens=query_len,
                sampling=params if samples else None,
                namespace=BlockHash(b""),
                block_table=[BlockId(0)] * num_blocks,
            )
            scheduled.append(ScheduledSequence(sequence, 0, query_len, samples))
        return StepBatch(scheduled)
