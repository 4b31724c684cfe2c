"""llama.cpp through its C interface: no tokenizer, no Python sampler, one batch per step over many sequences."""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np

from loadtest.engine.gguf_checkpoint import gguf_file
from loadtest.engine.requests import TokenRequest

MAX_SEQUENCES = 64
CONTEXT_TOKENS = 32768
BATCH_TOKENS = 512


@dataclass(slots=True)
class _Slot:
    """A request under way in one of llama.cpp's sequences."""

    request: TokenRequest
    computed: int = 0
    outputs: int = 0
    last_token: int = -1


class LlamaCppContestant:
    """Variants: `bf16`, `f16`, `q8_0`, `q4_0`."""

    def __init__(self, directory: Path, variant: str, threads: int) -> None:
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        path = gguf_file(directory, variant)
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT_TOKENS, BATCH_TOKENS, BATCH_TOKENS
        params.n_seq_max, params.kv_unified = MAX_SEQUENCES, True
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._random = random.Random(1)
        self._contexts: dict[int, int] = {}  # tokens by sequence, as `decode` left them, without those of its steps

    def decode(self, batch: int, context: int, steps: int) -> float:
        for sequence in range(batch):
            self._set_context(sequence, context)
        started_s = time.perf_counter()
        for step in range(steps):
            self._compute([(self._token(), context + step, sequence, True) for sequence in range(batch)])
            self._likeliest(range(batch))
        return (time.perf_counter() - started_s) / steps

    def prefill(self, tokens: int) -> float:
        self._clear()
        entries = [(self._token(), position, 0, position == tokens - 1) for position in range(tokens)]
        started_s = time.perf_counter()
        self._compute(entries)
        self._likeliest([tokens - 1])
        return time.perf_counter() - started_s

    def workload(self, requests: list[TokenRequest], how: str) -> float:
        """Continuous batching as llama-server does it: decode tokens first, then prompts up to the batch's size."""
        self._clear()
        started_s = time.perf_counter()
        waiting = list(reversed(requests))
        slots: dict[int, _Slot] = {}
        while waiting or slots:
            for sequence in range(MAX_SEQUENCES):
                if sequence not in slots and waiting:
                    slots[sequence] = _Slot(waiting.pop())
            self._step(slots)
        return time.perf_counter() - started_s

    def _step(self, slots: dict[int, _Slot]) -> None:
        entries: list[tuple[int, int, int, bool]] = []
        rows: list[tuple[int, int]] = []
        for sequence, slot in sorted(slots.items(), key=lambda item: item[1].last_token < 0):
            if slot.last_token >= 0:
                tokens = [slot.last_token]
            else:
                tokens = slot.request.prompt[slot.computed : slot.computed + BATCH_TOKENS - len(entries)]
            for position, token in enumerate(tokens, start=slot.computed):
                entries.append((token, position, sequence, position + 1 >= len(slot.request.prompt)))
            slot.computed += len(tokens)
            if tokens and entries[-1][3]:
                rows.append((sequence, len(entries) - 1))
        self._compute(entries)
        for (sequence, _), token in zip(rows, self._likeliest([row for _, row in rows]), strict=True):
            slot = slots[sequence]
            slot.outputs, slot.last_token = slot.outputs + 1, token
            if slot.outputs >= slot.request.output_tokens:
                llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), sequence, -1, -1)
                del slots[sequence]

    def _compute(self, entries: list[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wants_logits) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wants_logits
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(self._context)

    def _likeliest(self, rows: Iterable[int]) -> list[int]:
        return [
            int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, row), (self.vocab_size,)).argmax())
            for row in rows
        ]

    def _set_context(self, sequence: int, num_tokens: int) -> None:
        """Leaves a sequence so many tokens long; an earlier call has mostly computed them."""
        known = self._contexts.get(sequence, 0)
        entries = [(self._token(), position, sequence, False) for position in range(known, num_tokens)]
        if entries:
            self._compute(entries)
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), sequence, num_tokens, -1)
        self._contexts[sequence] = num_tokens

    def _clear(self) -> None:
        self._contexts.clear()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _token(self) -> int:
        return self._random.randrange(3, self.vocab_size)
