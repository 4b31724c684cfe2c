"""transformers: `generate` on static batches, one request after the other, and its own continuous batching."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, DynamicCache, GenerationConfig

from loadtest.engine.requests import TokenRequest


class TransformersContestant:
    """Variants: `float32`, `bfloat16`."""

    def __init__(self, directory: Path, variant: str, threads: int) -> None:
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, variant)).eval()
        self.vocab_size = int(self._model.config.vocab_size)
        self._contexts: dict[tuple[int, int], tuple[torch.Tensor, DynamicCache]] = {}  # by what `decode` was given

    def decode(self, batch: int, context: int, steps: int) -> float:
        ids, cache = self._contexts.get((batch, context)) or self._new_context(batch, context)
        seconds = self._generate(ids, torch.ones_like(ids), steps, past_key_values=cache)
        cache.crop(context - cache.get_seq_length())
        return seconds / steps

    def _new_context(self, batch: int, context: int) -> tuple[torch.Tensor, DynamicCache]:
        """One more token than the cache knows, of each sequence."""
        ids = torch.randint(3, self.vocab_size, (batch, context + 1))
        cache = DynamicCache(config=self._model.config)
        self._model(ids[:, :context], past_key_values=cache, logits_to_keep=1, use_cache=True)
        self._contexts[batch, context] = ids, cache
        return ids, cache

    def prefill(self, tokens: int) -> float:
        ids = torch.randint(3, self.vocab_size, (1, tokens))
        started_s = time.perf_counter()
        self._model(ids, logits_to_keep=1, use_cache=True)
        return time.perf_counter() - started_s

    def workload(self, requests: list[TokenRequest], how: str) -> float:
        if how == "continuous":
            return self._continuous(requests)
        size = int(how)  # of the static batches, requests of like output length together: the best case
        ordered = sorted(requests, key=lambda request: request.output_tokens)
        return sum(self._static(ordered[start : start + size]) for start in range(0, len(ordered), size))

    def _static(self, batch: list[TokenRequest]) -> float:
        length = max(len(request.prompt) for request in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, length - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, length - len(request.prompt) :] = 1
        return self._generate(ids, mask, max(request.output_tokens for request in batch))

    def _generate(self, ids: torch.Tensor, mask: torch.Tensor, new_tokens: int, **more: object) -> float:
        started_s = time.perf_counter()
        self._model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            **more,
        )
        return time.perf_counter() - started_s

    def _continuous(self, requests: list[TokenRequest]) -> float:
        config = ContinuousBatchingConfig(
            page_size=32, num_blocks=1200, max_batch_tokens=512, allow_block_sharing=False
        )
        generation = GenerationConfig(do_sample=False, max_new_tokens=256, eos_token_id=-1, pad_token_id=0)
        with self._model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config, warmup=False
        ) as manager:
            started_s = time.perf_counter()
            for request in requests:
                manager.add_request(request.prompt, max_new_tokens=request.output_tokens)
            finished = 0
            while finished < len(requests):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    finished += 1
                elif not manager.is_running():
                    raise RuntimeError("transformers' continuous batching stopped")
            return time.perf_counter() - started_s
