"""The fields of a body that say how tokens are chosen, as the engine's sampling parameters."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any

import msgspec

from services.gateway.schemas.generation import GenerationBody
from services.gateway.served_model import ServedModel
from services.gateway.settings import GatewaySettings
from shared.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from shared.engine.thinking import Thinking
from shared.errors import InvalidRequest

MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
_NEUTRAL: tuple[object, ...] = (None, 0, 1, -1, [], {})  # none of the fields below asks for anything with these
_NOT_WITH_BEAMS = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "min_tokens", "stop",
)  # fmt: skip
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def sampling_of(body: GenerationBody, model: ServedModel, *, grammar: str, thinking: Thinking | None) -> SamplingParams:
    """All but the output limit where the body leaves it open: then `max_tokens` is 1.

    Args:
        body: Checked field by field.
        model: Fills in what the body is silent about.
        grammar: What the output must match; "" = anything.
        thinking: What the engine needs to know about reasoning.

    Raises:
        InvalidRequest: A field contradicts another one or the model.
    """
    limit, min_tokens = body.max_output_tokens, body.min_tokens or 0
    if limit is not None and min_tokens > limit:
        raise InvalidRequest(f"'min_tokens' is {min_tokens}, more than 'max_tokens', {limit}", param="min_tokens")
    if grammar and body.ignore_eos:
        raise InvalidRequest("'ignore_eos' would run on after the end of a structured output", param="ignore_eos")
    if grammar and body.allowed_token_ids is not None:
        raise InvalidRequest("'allowed_token_ids' and structured output exclude each other", param="allowed_token_ids")
    if body.length_penalty not in (None, 1.0) and not body.use_beam_search:
        raise InvalidRequest("'length_penalty' compares beams: it needs 'use_beam_search'", param="length_penalty")
    default, allowed, vocab_size = model.defaults, body.allowed_token_ids, model.vocab_size
    return SamplingParams(
        max_tokens=limit or 1,
        temperature=default.temperature if body.temperature is None else body.temperature,
        top_p=default.top_p if body.top_p is None else body.top_p,
        top_k=max(default.top_k if body.top_k is None else body.top_k, 0),
        min_p=default.min_p if body.min_p is None else body.min_p,
        seed=secrets.randbits(64) if body.seed is None else body.seed % 2**64,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=default.repetition_penalty if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=_logit_bias(body.logit_bias or {}, vocab_size),
        min_tokens=min_tokens,
        stop_token_ids=frozenset(checked_token_ids(body.stop_token_ids or [], vocab_size, "stop_token_ids")),
        ignore_eos=bool(body.ignore_eos),
        num_logprobs=body.num_logprobs,
        allowed_token_ids=(
            None if allowed is None else frozenset(checked_token_ids(allowed, vocab_size, "allowed_token_ids"))
        ),
        bad_words=_bad_words(body.bad_words or [], model),
        grammar=grammar,
        thinking=thinking,
        num_prompt_logprobs=body.prompt_logprobs,
        length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
    )


def check_beams(body: GenerationBody, sampling: SamplingParams, width: int) -> None:
    """Passes if what the body asks for can be searched with beams, which compares whole outputs and draws nothing.

    Raises:
        InvalidRequest: It asks for what only sampling gives, or for too many beams.
    """
    if width > MAX_LOGPROBS // 2:
        raise InvalidRequest(f"{width} beams, at most {MAX_LOGPROBS // 2} are searched", param="n")
    for field in _NOT_WITH_BEAMS:
        if getattr(body, field) not in _NEUTRAL:
            raise InvalidRequest(f"{field!r} belongs to sampling, not to 'use_beam_search'", param=field)
    if sampling.is_guided or sampling.num_prompt_logprobs is not None:
        raise InvalidRequest(
            "'use_beam_search' goes with neither structured output nor limits on tokens nor scores of the prompt",
            param="use_beam_search",
        )


def stop_strings(stop: str | list[str] | None, settings: GatewaySettings) -> tuple[str, ...]:
    """`stop`, without repetitions.

    Raises:
        InvalidRequest: Too many, too long, or empty ones.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(dict.fromkeys(stop or ()))
    if len(stops) > settings.max_stop_strings:
        raise InvalidRequest(f"{len(stops)} stop strings, at most {settings.max_stop_strings}", param="stop")
    for text in stops:
        if not 1 <= len(text) <= settings.max_stop_chars:
            raise InvalidRequest(
                f"a stop string of {len(text)} characters; it must have 1 to {settings.max_stop_chars}", param="stop"
            )
    return stops


def checked_token_ids(token_ids: Sequence[object], vocab_size: int, param: str) -> list[int]:
    """Token ids of the vocabulary.

    Raises:
        InvalidRequest: One is not.
    """
    try:
        checked: list[int] = msgspec.convert(token_ids, _token_ids_below(vocab_size))
    except msgspec.ValidationError:
        wrong = next(i for i in token_ids if type(i) is not int or not 0 <= i < vocab_size)
        raise InvalidRequest(f"{param!r}: {wrong!r:.40} is no token id in [0, {vocab_size})", param=param) from None
    return checked


@lru_cache(maxsize=16)
def _token_ids_below(vocab_size: int) -> Any:
    """As a type: checking thousands of ids in a loop of our own would be among the dearest parts of a request."""
    return list[Annotated[int, msgspec.Meta(ge=0, lt=vocab_size)]]


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    parsed: dict[int, float] = {}
    for key, value in bias.items():
        if not _TOKEN_ID.fullmatch(key) or int(key) >= vocab_size:
            raise InvalidRequest(f"'logit_bias': {key[:32]!r} is no token id in [0, {vocab_size})", param="logit_bias")
        if not -100 <= value <= 100:
            raise InvalidRequest(f"'logit_bias' of token {key} is {value}, not in [-100, 100]", param="logit_bias")
        parsed[int(key)] = value
    return parsed


def _bad_words(words: list[str], model: ServedModel) -> tuple[tuple[int, ...], ...]:
    """Every word as the tokenizer writes it at the beginning of a text and after a space."""
    if len(words) > MAX_BAD_WORDS:
        raise InvalidRequest(f"{len(words)} bad words, at most {MAX_BAD_WORDS}", param="bad_words")
    spelled: dict[tuple[int, ...], None] = {}
    for word in words:
        if len(word) > MAX_BAD_WORD_CHARS:
            raise InvalidRequest(
                f"a bad word of {len(word)} characters, at most {MAX_BAD_WORD_CHARS}", param="bad_words"
            )
        for text in (word.lstrip(), " " + word.lstrip()):
            token_ids = tuple(model.tokenizer.encode(text, add_special_tokens=False))
            if not word.strip() or not token_ids:
                raise InvalidRequest("'bad_words' has a word without characters", param="bad_words")
            spelled[token_ids] = None
    return tuple(spelled)
