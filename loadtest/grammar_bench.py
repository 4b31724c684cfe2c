"""Compares libraries for constrained output: compile time, mask time per token, memory, JSON Schema coverage.

    python -m loadtest.grammar_bench llguidance --suite DIRECTORY      # and `xgrammar`, in a process of its own

`--suite` is `tests/draft2020-12` of https://github.com/json-schema-org/JSON-Schema-Test-Suite. A case counts as
*unsound* if the library accepts the schema and lets an instance through that the suite calls invalid, as *too strict*
if it keeps a valid one out (compact JSON, keys in the schema's order).
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shared.models.resolve import resolve_model
from shared.tokenization.tokenizer import Tokenizer

SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            f"field_{i}": {
                "type": "object",
                "properties": {"kind": {"enum": ["a", "b", f"c{i}"]}, "value": {"type": ["number", "null"]}},
                "required": ["kind", "value"],
                "additionalProperties": False,
            }
            for i in range(40)
        },
        "required": [f"field_{i}" for i in range(40)],
        "additionalProperties": False,
    },
    "any object": {"type": "object"},
}
INSTANCES: dict[str, Any] = {
    "flat": {"name": "Ada Lovelace, the first programmer", "age": 36, "tags": ["mathematics", "engines", "poetry"]},
    "nested": {f"field_{i}": {"kind": f"c{i}", "value": 12.5} for i in range(40)},
    "any object": {"anything": [1, 2.5, {"deep": [True, None, "text"]}], "more": "words in a sentence"},
}


class Library(Protocol):
    """One library over one tokenizer."""

    def compile(self, schema: object) -> Any:
        """A matcher at its start; raises ValueError where the schema is refused."""
        ...

    def mask(self, matcher: Any, row: np.ndarray) -> None:
        """Writes the allowed tokens, a bit each."""
        ...

    def consume(self, matcher: Any, token_id: int) -> bool:
        """One token; False if it is not allowed."""
        ...

    def accepts_end(self, matcher: Any) -> bool:
        """The text may end here."""
        ...


class LlGuidance:
    """llguidance over the checkpoint's tokenizer."""

    def __init__(self, directory: Path, vocab_size: int, eos: int) -> None:
        import llguidance

        self._lib = llguidance
        raw = (directory / "tokenizer.json").read_text()
        self._tokenizer = llguidance.LLTokenizer(raw, n_vocab=vocab_size, eos_token=eos)

    def compile(self, schema: object) -> Any:
        """See `Library`."""
        grammar = self._lib.LLMatcher.grammar_from_json_schema(json.dumps(schema))
        matcher = self._lib.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def mask(self, matcher: Any, row: np.ndarray) -> None:
        """See `Library`."""
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)

    def consume(self, matcher: Any, token_id: int) -> bool:
        """See `Library`."""
        return bool(matcher.consume_token(token_id))

    def accepts_end(self, matcher: Any) -> bool:
        """See `Library`."""
        return bool(matcher.is_accepting())


class XGrammar:
    """xgrammar over the same vocabulary."""

    def __init__(self, directory: Path, vocab_size: int, eos: int) -> None:
        import torch
        import xgrammar
        from tokenizers import Tokenizer as RawTokenizer

        self._lib, self._torch = xgrammar, torch
        raw = RawTokenizer.from_file(str(directory / "tokenizer.json"))
        vocab = raw.get_vocab(with_added_tokens=True)
        encoded = [""] * vocab_size
        for token, token_id in vocab.items():
            encoded[token_id] = token
        info = xgrammar.TokenizerInfo(
            encoded, xgrammar.VocabType.BYTE_LEVEL, vocab_size=vocab_size, stop_token_ids=[eos]
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, schema: object) -> Any:
        """See `Library`."""
        try:
            compiled = self._compiler.compile_json_schema(json.dumps(schema), any_whitespace=True, strict_mode=False)
        except Exception as exc:
            raise ValueError(str(exc)) from exc
        return self._lib.GrammarMatcher(compiled)

    def mask(self, matcher: Any, row: np.ndarray) -> None:
        """See `Library`."""
        matcher.fill_next_token_bitmask(self._torch.from_numpy(row.view(np.int32)[None]))

    def consume(self, matcher: Any, token_id: int) -> bool:
        """See `Library`."""
        return bool(matcher.accept_token(token_id))

    def accepts_end(self, matcher: Any) -> bool:
        """See `Library`."""
        try:
            return bool(matcher.is_completed() if hasattr(matcher, "is_completed") else matcher.is_terminated())
        except AttributeError:
            return False


LIBRARIES: dict[str, Callable[[Path, int, int], Library]] = {"llguidance": LlGuidance, "xgrammar": XGrammar}


def measure_speed(library: Library, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Prints compile and mask times of the sample schemas."""
    row = np.zeros((vocab_size + 31) // 32, dtype=np.uint32)
    for name, schema in SCHEMAS.items():
        compile_s, masks_s, consume_s = [], [], []
        tokens = tokenizer.encode(json.dumps(INSTANCES[name], separators=(",", ":")), add_special_tokens=False)
        for _ in range(15):
            started_s = time.perf_counter()
            matcher = library.compile(schema)
            compile_s.append(time.perf_counter() - started_s)
            for token in tokens:
                started_s = time.perf_counter()
                library.mask(matcher, row)
                masked_s = time.perf_counter()
                assert library.consume(matcher, token), (name, token)
                consume_s.append(time.perf_counter() - masked_s)
                masks_s.append(masked_s - started_s)
        masks_s.sort()
        print(
            f"{name:12} compile {statistics.median(compile_s) * 1e3:8.2f} ms (max {max(compile_s) * 1e3:.1f}); mask "
            f"median {statistics.median(masks_s) * 1e6:7.1f} us, p99 {masks_s[int(len(masks_s) * 0.99)] * 1e6:.1f} us, "
            f"max {masks_s[-1] * 1e6:8.1f} us; consume median {statistics.median(consume_s) * 1e6:.1f} us; "
            f"{len(tokens)} tokens"
        )


def measure_coverage(library: Library, tokenizer: Tokenizer, eos: int, suite: Path) -> None:
    """Prints how many schemas of the suite compile, and how the instances of those fare."""
    total: Counter[str] = Counter()
    for file in sorted(suite.glob("*.json")):
        counts: Counter[str] = Counter()
        for case in json.loads(file.read_text()):
            try:
                library.compile(case["schema"])
            except ValueError:
                counts["refused"] += 1
                continue
            counts["compiled"] += 1
            verdicts = [_verdict(library, tokenizer, eos, case["schema"], test) for test in case["tests"]]
            counts.update(verdicts)
            counts["unsound schemas"] += "unsound" in verdicts
        total.update(counts)
        print(f"  {file.stem:24}", dict(sorted(counts.items())))
    print("  total                   ", dict(sorted(total.items())))


def _verdict(library: Library, tokenizer: Tokenizer, eos: int, schema: object, test: dict[str, Any]) -> str:
    matcher = library.compile(schema)
    text = json.dumps(test["data"], separators=(",", ":"), ensure_ascii=False)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    accepted = all(library.consume(matcher, token) for token in tokens) and library.consume(matcher, eos)
    if accepted == test["valid"]:
        return "right"
    return "unsound" if accepted else "too strict"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--model", default="pydoc-mini")
    parser.add_argument("--suite", type=Path)
    arguments = parser.parse_args()
    directory = resolve_model(arguments.model, with_weights=False)
    tokenizer = Tokenizer.from_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    vocab_size, eos = config["vocab_size"], config["eos_token_id"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started_s = time.perf_counter()
    library = LIBRARIES[arguments.library](directory, vocab_size, eos)
    loaded_s = time.perf_counter() - started_s
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{arguments.library}: import and tokenizer {loaded_s:.2f} s, {(after - before) / 1024:.0f} MiB resident")
    measure_speed(library, tokenizer, vocab_size)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = [library.compile({**SCHEMAS["nested"], "title": str(i)}) for i in range(50)]
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{len(kept)} matchers of 'nested': {(after - before) / len(kept):.0f} KiB each")
    if arguments.suite:
        measure_coverage(library, tokenizer, eos, arguments.suite)


if __name__ == "__main__":
    main()
