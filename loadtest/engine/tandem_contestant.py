"""Tandem's engine in one process: scheduler, runner, sampler and kernels, no services."""

from __future__ import annotations

import itertools
import queue
import random
import tempfile
import time
from pathlib import Path

from loadtest.engine.requests import TokenRequest
from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence
from shared.engine.step import StepOutputs
from shared.identity import BlockHash, SessionId
from shared.worker.loading import load_engine
from shared.worker.settings import WorkerSettings

KV_CACHE_BYTES = 1 << 30
MAX_OUTPUT_TOKENS = 1024  # of sequences that are timed while they decode, and aborted then
_NO_REUSE = BlockHash(bytes(16))  # prompts are random: nothing is found twice


class TandemContestant:
    """Variants: `float32`, `bfloat16`, `int8`, `int4` (the last two with bfloat16 activations and cache)."""

    def __init__(self, directory: Path, variant: str, threads: int) -> None:
        scratch = Path(tempfile.mkdtemp(prefix="tandem-contestant-"))
        options: dict[str, object] = {"dtype": variant}
        if variant.startswith("int"):
            options = {"dtype": "bfloat16", "quantization": variant}
        settings = WorkerSettings(
            model=str(directory),
            worker_id=f"contestant-{variant}-{scratch.name[-8:]}",
            transfer_socket=scratch / "none",
            run_dir=scratch,
            kv_cache_bytes=KV_CACHE_BYTES,
            threads=threads,
            max_step_s=0.0,  # no stream and no cancel waits here; the others do not bound their steps by time either
            log_level="error",
            **options,
        )
        self._outputs: queue.SimpleQueue[StepOutputs] = queue.SimpleQueue()
        loaded = load_engine(settings, "decode", self._outputs.put, lambda request: None)
        loaded.memory.unlink()  # the mapping is enough
        self._engine = loaded.engine
        self._engine.start()
        self.vocab_size = loaded.vocab_size
        self._random = random.Random(1)
        self._numbers = itertools.count()

    def decode(self, batch: int, context: int, steps: int) -> float:
        # The same prompts each time: all but their last tokens are cached from the second call on.
        sequences = [self._sequence(self._prompt(index, context + 1), MAX_OUTPUT_TOKENS) for index in range(batch)]
        self._engine.submit(sequences)
        while not all(sequence.num_output_tokens for sequence in sequences):
            self._outputs.get()
        started_s, num_steps = time.perf_counter(), 0
        while num_steps < steps:
            num_steps += bool(self._outputs.get().tokens)
        seconds = time.perf_counter() - started_s
        self._engine.abort(sequence.sequence_id for sequence in sequences)
        finished = 0
        while finished < batch:
            finished += len(self._outputs.get().finished)
        return seconds / steps

    def prefill(self, tokens: int) -> float:
        started_s = time.perf_counter()
        self._engine.submit([self._sequence(self._tokens(tokens), 1)])
        while not self._outputs.get().tokens:
            pass
        return time.perf_counter() - started_s

    def workload(self, requests: list[TokenRequest], how: str) -> float:
        """All at once (`own`), or so many at a time."""
        # A namespace of its own: no prefix of an earlier round is found again.
        namespace = BlockHash(self._random.randbytes(16))
        waiting = [self._sequence(request.prompt, request.output_tokens, namespace) for request in reversed(requests)]
        window = len(requests) if how == "own" else int(how)
        started_s = time.perf_counter()
        self._engine.submit([waiting.pop() for _ in range(min(window, len(waiting)))])
        finished = 0
        while finished < len(requests):
            ended = len(self._outputs.get().finished)
            finished += ended
            if following := [waiting.pop() for _ in range(min(ended, len(waiting)))]:
                self._engine.submit(following)
        return time.perf_counter() - started_s

    def _prompt(self, index: int, count: int) -> list[int]:
        ids = random.Random(index)
        return [ids.randrange(3, self.vocab_size) for _ in range(count)]

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(3, self.vocab_size) for _ in range(count)]

    def _sequence(self, prompt: list[int], output_tokens: int, namespace: BlockHash = _NO_REUSE) -> Sequence:
        return Sequence(
            session_id=SessionId(f"contest-{next(self._numbers)}"),  # choices of one session wait for each other
            token_ids=list(prompt),
            num_prompt_tokens=len(prompt),
            sampling=SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True),
            namespace=namespace,
        )
