"""Log-probabilities in the shapes of the two endpoints.

Chat: one object per token, its alternatives inside. Completions: four parallel lists, alternatives keyed by text. Of a
prompt, in vLLM's shape: per token an object keyed by token id; null for the first token, which nothing precedes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from services.gateway.replies.choice_text import TokenEntry
from services.gateway.sessions.session import PromptScore, Session
from shared.tokenization.detokenizer import IncrementalDetokenizer
from shared.tokenization.tokenizer import Tokenizer

FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot say; the value that OpenAI and vLLM use."""


class TokenNames:
    """How replies call tokens: by what they spell, or "token_id:7".

    Attributes:
        name: Of one token.
    """

    def __init__(self, tokenizer: Tokenizer, *, by_id: bool) -> None:
        self.tokenizer = tokenizer
        self.name: Callable[[int], str] = "token_id:{}".format if by_id else tokenizer.token_text


def chat_logprobs(entries: Sequence[TokenEntry], names: TokenNames) -> dict[str, object]:
    """`choices[].logprobs` of a chat reply."""
    return {"content": [_chat_entry(entry, names) for entry in entries], "refusal": None}


def completion_logprobs(
    entries: Sequence[TokenEntry], names: TokenNames, *, text_offset: int, prompt: dict[str, list[object]] | None = None
) -> dict[str, object]:
    """`choices[].logprobs` of a completion.

    Args:
        entries: Of the generated tokens.
        names: Of tokens.
        text_offset: Where the generated text begins in the reply's text.
        prompt: What comes before: the echoed prompt's, see `echoed_logprobs`.
    """
    lists: dict[str, list[object]] = {
        "tokens": [names.name(entry.token_id) for entry in entries],
        "token_logprobs": [_finite(entry.logprobs.logprob) for entry in entries],
        "top_logprobs": [_alternatives(entry, names) for entry in entries],
        "text_offset": [text_offset + entry.offset for entry in entries],
    }
    return {key: [*(prompt[key] if prompt else ()), *values] for key, values in lists.items()}


def echoed_logprobs(session: Session, names: TokenNames) -> dict[str, list[object]]:
    """The four lists for a prompt's tokens, scores of all but the first."""
    detokenizer = IncrementalDetokenizer(names.tokenizer)
    offsets: list[object] = []
    length = 0
    token_ids = session.prompt_token_ids
    for token_id in token_ids:
        offsets.append(length)
        length += len(detokenizer.push(token_id))
    entries = _prompt_entries(session)
    return {
        "tokens": [names.name(token_id) for token_id in token_ids],
        "token_logprobs": [None, *(_finite(entry.logprobs.logprob) for entry in entries)],
        "top_logprobs": [None, *(_alternatives(entry, names) for entry in entries)],
        "text_offset": offsets,
    }


def prompt_logprobs(session: Session, names: TokenNames) -> list[object]:
    """`prompt_logprobs`."""
    scored = zip(session.prompt_token_ids[1:], session.prompt_scores, strict=True)
    return [None, *(_ranked(token_id, score, names) for token_id, score in scored)]


def _ranked(token_id: int, score: PromptScore, names: TokenNames) -> dict[str, object]:
    top = zip(score.logprobs.top_token_ids, score.logprobs.top_logprobs, strict=True)
    ranked = [(top_id, logprob, rank) for rank, (top_id, logprob) in enumerate(top, start=1)]
    chosen = (token_id, score.logprobs.logprob, score.rank)
    return {
        str(some_id): {"logprob": _finite(logprob), "rank": rank, "decoded_token": names.name(some_id)}
        for some_id, logprob, rank in [chosen, *(entry for entry in ranked if entry[0] != token_id)]
    }


def _prompt_entries(session: Session) -> list[TokenEntry]:
    scored = zip(session.prompt_token_ids[1:], session.prompt_scores, strict=True)
    return [TokenEntry(token_id, score.logprobs, 0) for token_id, score in scored]


def _chat_entry(entry: TokenEntry, names: TokenNames) -> dict[str, object]:
    logprobs = entry.logprobs
    return {
        **_named(entry.token_id, logprobs.logprob, names),
        "top_logprobs": [
            _named(token_id, logprob, names)
            for token_id, logprob in zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)
        ],
    }


def _named(token_id: int, logprob: float, names: TokenNames) -> dict[str, object]:
    raw = names.tokenizer.token_bytes(token_id)
    return {"token": names.name(token_id), "logprob": _finite(logprob), "bytes": list(raw)}


def _alternatives(entry: TokenEntry, names: TokenNames) -> dict[str, float]:
    """The likeliest tokens, and the sampled one if it is not among them. Of tokens of equal text the likelier stays."""
    named: dict[str, float] = {}
    logprobs, name = entry.logprobs, names.name
    for token_id, logprob in zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True):
        named.setdefault(name(token_id), _finite(logprob))
    named.setdefault(name(entry.token_id), _finite(logprobs.logprob))
    return named


def _finite(logprob: float) -> float:
    return max(logprob, FLOOR)
