"""Log-probabilities in the shapes of the two endpoints.

Chat: one object per token, its alternatives inside. Completions: four parallel lists, alternatives keyed by text.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.gateway.choice_text import TokenEntry
from shared.tokenization.tokenizer import Tokenizer

FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot say; the value that OpenAI and vLLM use."""


def chat_logprobs(entries: Sequence[TokenEntry], tokenizer: Tokenizer) -> dict[str, object]:
    """`choices[].logprobs` of a chat reply."""
    return {"content": [_chat_entry(entry, tokenizer) for entry in entries], "refusal": None}


def completion_logprobs(entries: Sequence[TokenEntry], tokenizer: Tokenizer, *, text_offset: int) -> dict[str, object]:
    """`choices[].logprobs` of a completion; `text_offset` is where the generated text begins in the reply's text."""
    return {
        "tokens": [tokenizer.token_text(entry.token_id) for entry in entries],
        "token_logprobs": [_finite(entry.logprobs.logprob) for entry in entries],
        "top_logprobs": [_alternatives(entry, tokenizer) for entry in entries],
        "text_offset": [text_offset + entry.offset for entry in entries],
    }


def _chat_entry(entry: TokenEntry, tokenizer: Tokenizer) -> dict[str, object]:
    logprobs = entry.logprobs
    return {
        **_named(entry.token_id, logprobs.logprob, tokenizer),
        "top_logprobs": [
            _named(token_id, logprob, tokenizer)
            for token_id, logprob in zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)
        ],
    }


def _named(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, object]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(raw)}


def _alternatives(entry: TokenEntry, tokenizer: Tokenizer) -> dict[str, float]:
    """The likeliest tokens, and the sampled one if it is not among them. Of tokens of equal text the likelier stays."""
    named: dict[str, float] = {}
    logprobs = entry.logprobs
    for token_id, logprob in zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True):
        named.setdefault(tokenizer.token_text(token_id), _finite(logprob))
    named.setdefault(tokenizer.token_text(entry.token_id), _finite(logprobs.logprob))
    return named


def _finite(logprob: float) -> float:
    return max(logprob, FLOOR)
