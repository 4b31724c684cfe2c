"""Compiles what an output must match before a worker is bothered with it, in threads of its own, within a time limit.

A compilation cannot be ended from outside, but its work is bounded (`shared/engine/grammar.py`): the threads come back.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

from services.gateway.served_model import ServedModel
from shared.engine.grammar import GrammarCompiler
from shared.errors import InvalidRequest


class GrammarCheck:
    """Owned by the gateway, closed with it. What passed once passes again at no cost while it is remembered."""

    def __init__(self, model: ServedModel, *, timeout_s: float, num_threads: int = 2) -> None:
        self._model = model
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="grammar-check")
        self._compiler: GrammarCompiler | None = None
        self._lock = threading.Lock()

    async def check(self, grammar: str, field: str) -> None:
        """Passes if workers will be able to follow the grammar.

        Args:
            grammar: In llguidance's format.
            field: Of the request, that it came from.

        Raises:
            InvalidRequest: The grammar is wrong, or needs what is not supported, which is named; or takes too long.
        """
        checking = asyncio.get_running_loop().run_in_executor(self._threads, self._compile, grammar)
        try:
            await asyncio.wait_for(checking, self._timeout_s)
        except TimeoutError:
            raise InvalidRequest(f"{field!r} was not compiled within {self._timeout_s:g} s", param=field) from None
        except InvalidRequest as exc:
            raise InvalidRequest(f"{field!r} cannot be kept to: {exc.message}", param=field) from exc

    def close(self) -> None:
        """Takes no more work."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: str) -> None:
        with self._lock:
            if self._compiler is None:
                model = self._model
                file = model.directory / "tokenizer.json"
                if not model.eos_token_ids:
                    raise InvalidRequest("the model has no end-of-sequence token")
                self._compiler = GrammarCompiler(
                    file.read_text(encoding="utf-8"), model.vocab_size, model.eos_token_ids
                )
        self._compiler.matcher(grammar)
