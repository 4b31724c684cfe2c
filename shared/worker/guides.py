"""What says which tokens an output may get, made ready before the engine sees the sequence."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shared.engine.grammar import GrammarCompiler, OutputGrammar
from shared.engine.output_guide import OutputGuide
from shared.engine.sampling_params import SamplingParams
from shared.errors import InvalidRequest

COMPILE_TIMEOUT_S = 10.0


class Guides:
    """Compiles grammars in threads of its own, so that a slow one holds up nothing but others. One per worker.

    Args:
        directory: Of the checkpoint, whose tokenizer is read when the first grammar comes.
        vocab_size: Columns of the logits.
        eos_token_ids: The model's own.
        timeout_s: For one compilation, queueing included.
    """

    def __init__(
        self,
        directory: Path,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        *,
        timeout_s: float = COMPILE_TIMEOUT_S,
    ) -> None:
        self._directory = directory
        self._vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammars")
        self._compiler: GrammarCompiler | None = None
        self._lock = threading.Lock()

    async def prepare(self, params: SamplingParams, num_choices: int) -> list[OutputGuide]:
        """A guide for each choice.

        Raises:
            InvalidRequest: The grammar is wrong, too complex, or takes too long.
        """
        grammars: list[OutputGrammar] | list[None] = [None] * num_choices
        if params.grammar:
            compiling = asyncio.get_running_loop().run_in_executor(
                self._threads, self._compile, params.grammar, num_choices
            )
            try:
                grammars = await asyncio.wait_for(compiling, self._timeout_s)
            except TimeoutError:
                raise InvalidRequest(f"the grammar was not compiled within {self._timeout_s:g} s") from None
        return [OutputGuide(params, grammar, self.eos_token_ids, self._vocab_size) for grammar in grammars]

    def close(self) -> None:
        """Takes no more work."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: str, num_choices: int) -> list[OutputGrammar]:
        compiler = self._loaded()
        return [OutputGrammar(compiler.matcher(grammar)) for _ in range(num_choices)]

    def _loaded(self) -> GrammarCompiler:
        with self._lock:
            if self._compiler is None:
                file = self._directory / "tokenizer.json"
                if not file.is_file() or not self.eos_token_ids:
                    raise InvalidRequest("constrained output needs a tokenizer.json and an end-of-sequence token")
                tokenizer_json = file.read_text(encoding="utf-8")
                self._compiler = GrammarCompiler(tokenizer_json, self._vocab_size, sorted(self.eos_token_ids))
            return self._compiler
