"""A typed body to a `GenerationRequest`: the checks that need more than one field, the model, or the limits."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence

from services.gateway.request import Endpoint, GenerationRequest
from services.gateway.schemas.body import GenerationBody
from services.gateway.schemas.chat import ChatBody
from services.gateway.schemas.completion import CompletionBody
from services.gateway.served_model import ServedModel
from services.gateway.settings import GatewaySettings
from shared.engine.sampling_params import SamplingParams
from shared.errors import ContextLengthExceeded, InvalidRequest, UnsupportedField

COMPLETION_DEFAULT_MAX_TOKENS = 16
_TOKEN_ID = re.compile(r"\d{1,10}")


def chat_request(
    body: ChatBody, prompt: str, model: ServedModel, settings: GatewaySettings, *, created: int
) -> GenerationRequest:
    """The request behind a chat body whose messages were rendered to `prompt`.

    Raises:
        InvalidRequest: A field contradicts another one, the model or the limits.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise InvalidRequest(
            f"'max_tokens' is {body.max_tokens} and 'max_completion_tokens' is {body.max_completion_tokens}: "
            "they name the same limit",
            param="max_tokens",
        )
    return _request(
        body,
        model,
        settings,
        endpoint=Endpoint.CHAT,
        created=created,
        prompts=(prompt,),
        add_special_tokens=False,
        default_max_tokens=None,
    )


def completion_request(
    body: CompletionBody, model: ServedModel, settings: GatewaySettings, *, created: int
) -> GenerationRequest:
    """The request behind a completion body.

    Raises:
        InvalidRequest: A field contradicts another one, the model or the limits.
    """
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise UnsupportedField("'best_of' is not supported unless it equals 'n'", param="best_of")
    if body.echo and body.logprobs is not None:
        raise UnsupportedField("'echo' with 'logprobs' is not supported: it scores the prompt", param="echo")
    return _request(
        body,
        model,
        settings,
        endpoint=Endpoint.COMPLETION,
        created=created,
        prompts=prompts_of(body.prompt, model.vocab_size),
        add_special_tokens=True,
        default_max_tokens=COMPLETION_DEFAULT_MAX_TOKENS,
        echo=bool(body.echo),
    )


def output_limit(request: GenerationRequest, prompt_tokens: int, *, context_len: int, cache_len: int) -> int:
    """How many tokens may be generated for a prompt.

    Args:
        request: Says how many are wanted, if it says so.
        prompt_tokens: Of this prompt.
        context_len: Tokens that prompt and reply may have together.
        cache_len: Tokens that a worker's cache can hold: a request that sets no limit stays below it; one that sets a
            limit beyond it is refused by the worker, who knows the number of blocks.

    Raises:
        ContextLengthExceeded: The prompt, or prompt and `max_tokens` together, do not fit.
        InvalidRequest: The prompt is empty.
    """
    if not prompt_tokens:
        raise InvalidRequest("the prompt is empty: it has no tokens", param="prompt")
    room = context_len - prompt_tokens
    param = "messages" if request.endpoint is Endpoint.CHAT else "prompt"
    if room < 1:
        raise ContextLengthExceeded(
            f"the prompt has {prompt_tokens} tokens; the context length is {context_len} tokens, "
            "of which one must be left for the reply",
            param=param,
        )
    if request.max_tokens is None:
        return _default_limit(request, min(room, max(1, cache_len - prompt_tokens)))
    if request.max_tokens > room:
        raise ContextLengthExceeded(
            f"the context length is {context_len} tokens; the request wants {prompt_tokens + request.max_tokens} "
            f"({prompt_tokens} in the prompt, {request.max_tokens} for the reply)",
            param=param,
        )
    return request.max_tokens


def _default_limit(request: GenerationRequest, room: int) -> int:
    limit = room if request.default_max_tokens is None else min(room, request.default_max_tokens)
    if request.sampling.min_tokens > limit:
        raise ContextLengthExceeded(
            f"'min_tokens' is {request.sampling.min_tokens}, but at most {limit} tokens follow this prompt",
            param="min_tokens",
        )
    return limit


def _request(
    body: GenerationBody,
    model: ServedModel,
    settings: GatewaySettings,
    *,
    endpoint: Endpoint,
    created: int,
    prompts: tuple[str | list[int], ...],
    add_special_tokens: bool,
    default_max_tokens: int | None,
    echo: bool = False,
) -> GenerationRequest:
    model.check_name(body.model)
    num_choices = body.n or 1
    if len(prompts) * num_choices > settings.max_choices:
        raise InvalidRequest(
            f"{len(prompts)} prompts x n = {num_choices} is {len(prompts) * num_choices} choices, "
            f"at most {settings.max_choices} are served in one request",
            param="n",
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("'stream_options' needs 'stream': true", param="stream_options")
    prefix = "chatcmpl" if endpoint is Endpoint.CHAT else "cmpl"
    return GenerationRequest(
        request_id=f"{prefix}-{secrets.token_hex(12)}",
        endpoint=endpoint,
        created=created,
        prompts=prompts,
        add_special_tokens=add_special_tokens,
        num_choices=num_choices,
        max_tokens=body.max_output_tokens,
        default_max_tokens=default_max_tokens,
        sampling=_sampling(body, model),
        stop=_stop_strings(body.stop, settings),
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        timing=bool(body.timing),
        echo=echo,
        cache_salt=body.cache_salt or "",
        priority=body.priority or 0,
    )


def _sampling(body: GenerationBody, model: ServedModel) -> SamplingParams:
    limit, min_tokens = body.max_output_tokens, body.min_tokens or 0
    if limit is not None and min_tokens > limit:
        raise InvalidRequest(f"'min_tokens' is {min_tokens}, more than 'max_tokens', {limit}", param="min_tokens")
    default = model.defaults
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
        logit_bias=_logit_bias(body.logit_bias or {}, model.vocab_size),
        min_tokens=min_tokens,
        stop_token_ids=frozenset(checked_token_ids(body.stop_token_ids or [], model.vocab_size, "stop_token_ids")),
        ignore_eos=bool(body.ignore_eos),
        num_logprobs=body.num_logprobs,
    )


def _stop_strings(stop: str | list[str] | None, settings: GatewaySettings) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(dict.fromkeys(stop or ()))
    if len(stops) > settings.max_stop_strings:
        raise InvalidRequest(f"{len(stops)} stop strings, at most {settings.max_stop_strings}", param="stop")
    for text in stops:
        if not 1 <= len(text) <= settings.max_stop_chars:
            raise InvalidRequest(
                f"a stop string of {len(text)} characters; it must have 1 to {settings.max_stop_chars}", param="stop"
            )
    return stops


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    parsed: dict[int, float] = {}
    for key, value in bias.items():
        if not _TOKEN_ID.fullmatch(key) or int(key) >= vocab_size:
            raise InvalidRequest(f"'logit_bias': {key[:32]!r} is no token id in [0, {vocab_size})", param="logit_bias")
        if not -100 <= value <= 100:
            raise InvalidRequest(f"'logit_bias' of token {key} is {value}, not in [-100, 100]", param="logit_bias")
        parsed[int(key)] = value
    return parsed


def checked_token_ids(token_ids: Sequence[object], vocab_size: int, param: str) -> list[int]:
    """Token ids of the vocabulary.

    Raises:
        InvalidRequest: One is not.
    """
    checked: list[int] = []
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"{param!r}: {token_id!r:.40} is no token id in [0, {vocab_size})", param=param)
        checked.append(token_id)
    return checked


def prompts_of(prompt: object, vocab_size: int, param: str = "prompt") -> tuple[str | list[int], ...]:
    """Text, token ids, or a list of either, told apart by their first element.

    Raises:
        InvalidRequest: It is none of them.
    """
    if prompt is None:
        raise InvalidRequest(f"the field {param!r} is required", param=param)
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, list) or not prompt:
        raise InvalidRequest(f"{param!r} must be text, token ids, or a non-empty list of either", param=param)
    if all(isinstance(part, str) for part in prompt):
        return tuple(prompt)
    if isinstance(prompt[0], list):
        if not all(isinstance(part, list) for part in prompt):
            raise InvalidRequest(f"{param!r} must not mix text and token ids", param=param)
        return tuple(checked_token_ids(part, vocab_size, param) for part in prompt)
    return (checked_token_ids(prompt, vocab_size, param),)
