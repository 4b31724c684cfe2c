"""A typed body to a `GenerationRequest`: the checks that need more than one field, the model, or the limits."""

from __future__ import annotations

import secrets
from dataclasses import replace

from services.gateway.requests.request import Endpoint, GenerationRequest
from services.gateway.requests.sampling_fields import check_beams, checked_token_ids, sampling_of, stop_strings
from services.gateway.schemas.chat import ChatBody
from services.gateway.schemas.completion import CompletionBody
from services.gateway.schemas.generation import GenerationBody
from services.gateway.schemas.tools import NamedToolChoice
from services.gateway.served_model import ServedModel
from services.gateway.settings import GatewaySettings
from services.gateway.syntax.grammar_text import CallRules, Structure, grammar_text
from services.gateway.syntax.reply_parser import ReplySyntax
from services.gateway.syntax.structure_fields import structure_of
from services.gateway.syntax.thinking_fields import thinking_of
from services.gateway.syntax.tool_fields import call_rules, offered_tools
from shared.engine.thinking import Thinking
from shared.errors import ContextLengthExceeded, InvalidRequest
from shared.identity import TOKEN_BYTES, pack_tokens

COMPLETION_DEFAULT_MAX_TOKENS = 16


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
    tools = offered_tools(body, model.syntax, settings)
    rules = call_rules(body, tools, model.syntax, model.tokenizer)
    structure = structure_of(body, settings)
    if structure is not None and rules is not None and rules.is_required:
        raise InvalidRequest(f"a call is required, so there is no answer for {structure.field!r}", param="tool_choice")
    marks = model.syntax.reasoning
    is_thinking = marks is not None and prompt.rstrip().endswith(marks.start)
    thinking = None
    if model.chat_template is not None:
        thinking = thinking_of(body, model.syntax, model.chat_template, model.tokenizer, is_open=is_thinking)
    request = _request(
        body,
        model,
        settings,
        endpoint=Endpoint.CHAT,
        created=created,
        prompts=(prompt,),
        num_choices=body.n or 1,
        grammar=_grammar(structure, rules),
        thinking=thinking,
    )
    if body.use_beam_search:
        if body.max_output_tokens is None:
            raise InvalidRequest("'use_beam_search' needs 'max_tokens'", param="max_tokens")
        request = _with_beams(request, body)
    syntax = ReplySyntax(
        tools=model.syntax.tools if rules is not None else None,
        reasoning=marks,
        is_thinking=is_thinking,
        max_calls=rules.max_calls if rules is not None else None,
        is_named_call=isinstance(body.tool_choice, NamedToolChoice),
        shows_reasoning=body.include_reasoning is not False,
    )
    return replace(
        request,
        syntax=syntax if syntax.tools or syntax.reasoning else None,
        grammar_field=structure.field if structure is not None else "tools",
    )


def completion_request(
    body: CompletionBody, model: ServedModel, settings: GatewaySettings, *, created: int
) -> GenerationRequest:
    """The request behind a completion body.

    Raises:
        InvalidRequest: A field contradicts another one, the model or the limits.
    """
    num_choices = body.n or 1
    if body.best_of is not None:
        if body.best_of < num_choices:
            raise InvalidRequest(f"'best_of' is {body.best_of}, less than 'n', {num_choices}", param="best_of")
        if body.stream and body.best_of > num_choices:
            raise InvalidRequest("'best_of' chooses among complete outputs: they cannot be streamed", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("'max_tokens' is 0, which asks for nothing without 'echo': true", param="max_tokens")
    structure = structure_of(body, settings)
    request = _request(
        body,
        model,
        settings,
        endpoint=Endpoint.COMPLETION,
        created=created,
        prompts=prompts_of(body.prompt, model.vocab_size),
        num_choices=max(num_choices, body.best_of or 1),
        grammar=_grammar(structure, None),
        thinking=None,
    )
    sampling = request.sampling
    if body.echo and body.logprobs is not None and sampling.num_prompt_logprobs is None:
        sampling = replace(sampling, num_prompt_logprobs=body.logprobs)
    if request.num_choices > num_choices and sampling.num_logprobs is None:
        sampling = replace(sampling, num_logprobs=0)  # what the best is judged by
    if body.use_beam_search:
        sampling = _with_beams(replace(request, sampling=sampling), body).sampling
    return replace(
        request,
        sampling=sampling,
        num_returned=num_choices,
        add_special_tokens=True,
        default_max_tokens=COMPLETION_DEFAULT_MAX_TOKENS,
        max_tokens=1 if body.max_tokens == 0 else request.max_tokens,
        hides_output=body.max_tokens == 0,
        echo=bool(body.echo),
        grammar_field=structure.field if structure is not None else "",
    )


def _grammar(structure: Structure | None, rules: CallRules | None) -> str:
    try:
        return grammar_text(structure, rules)
    except ValueError as exc:
        field = structure.field if structure is not None else "tools"
        raise InvalidRequest(f"{field!r}: {str(exc)[:300]}", param=field) from exc


def _with_beams(request: GenerationRequest, body: GenerationBody) -> GenerationRequest:
    """Every choice is a beam, the best one first."""
    check_beams(body, request.sampling, request.num_choices)
    return replace(request, sampling=replace(request.sampling, beam_width=request.num_choices, temperature=0.0))


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
    param = _prompt_field(request)
    if not prompt_tokens:
        raise InvalidRequest("the prompt is empty: it has no tokens", param=param)
    room = context_len - prompt_tokens
    if room < 1:
        raise _too_long(str(prompt_tokens), request, context_len)
    if request.max_tokens is None:
        return _default_limit(request, min(room, max(1, cache_len - prompt_tokens)))
    if request.max_tokens > room:
        raise ContextLengthExceeded(
            f"this model's maximum context length is {context_len} tokens; "
            f"the request wants {prompt_tokens + request.max_tokens} "
            f"({prompt_tokens} in the prompt, {request.max_tokens} for the reply)",
            param=param,
        )
    return request.max_tokens


def check_length(least_tokens: int, request: GenerationRequest, context_len: int) -> None:
    """Refuses a text before it is tokenized, which takes seconds for one of megabytes, if it can never fit.

    Raises:
        ContextLengthExceeded: It has so many tokens at least, and nothing is to be cut off.
    """
    if request.truncate_prompt_tokens is None and least_tokens >= context_len:
        raise _too_long(f"at least {least_tokens}", request, context_len)


def _too_long(num_tokens: str, request: GenerationRequest, context_len: int) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"the prompt has {num_tokens} tokens; this model's maximum context length is {context_len} tokens, "
        "of which one must be left for the reply",
        param=_prompt_field(request),
    )


def _prompt_field(request: GenerationRequest) -> str:
    return "messages" if request.endpoint is Endpoint.CHAT else "prompt"


def truncated(prompt: bytes, request: GenerationRequest, context_len: int) -> bytes:
    """The part of a packed prompt that the request wants kept: all, unless `truncate_prompt_tokens` says otherwise."""
    limit = request.truncate_prompt_tokens
    if limit is None:
        return prompt
    if limit < 0:
        limit = max(1, context_len - (request.max_tokens or 1))
    num_bytes = limit * TOKEN_BYTES
    if len(prompt) <= num_bytes:
        return prompt
    return prompt[len(prompt) - num_bytes :] if request.truncates_left else prompt[:num_bytes]


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
    prompts: tuple[str | bytes, ...],
    num_choices: int,
    grammar: str,
    thinking: Thinking | None,
) -> GenerationRequest:
    """What both endpoints have in common; the rest as a chat has it."""
    model.check_name(body.model)
    if len(prompts) * num_choices > settings.max_choices:
        raise InvalidRequest(
            f"{len(prompts)} prompts x n = {num_choices} is {len(prompts) * num_choices} choices, "
            f"at most {settings.max_choices} are served in one request",
            param="prompt" if num_choices == 1 else "n",
        )
    options = body.stream_options
    if options is not None and not body.stream:
        raise InvalidRequest("'stream_options' needs 'stream': true", param="stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest("'prompt_logprobs' come with whole replies, not with streams", param="prompt_logprobs")
    prefix = "chatcmpl" if endpoint is Endpoint.CHAT else "cmpl"
    return GenerationRequest(
        request_id=f"{prefix}-{body.request_id or secrets.token_hex(12)}",
        endpoint=endpoint,
        created=created,
        prompts=prompts,
        add_special_tokens=False,
        num_choices=num_choices,
        max_tokens=body.max_output_tokens,
        default_max_tokens=None,
        sampling=sampling_of(body, model, grammar=grammar, thinking=thinking),
        num_returned=num_choices,
        stop=stop_strings(body.stop, settings),
        stream=bool(body.stream),
        returns_logprobs=body.num_logprobs is not None,
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.include_usage and options.continuous_usage_stats),
        timing=bool(body.timing),
        cache_salt=body.cache_salt or "",
        priority=body.priority or 0,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        returns_token_ids=bool(body.return_token_ids),
        names_tokens_by_id=bool(body.return_tokens_as_token_ids),
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        truncates_left=body.truncation_side != "right",
    )


def prompts_of(prompt: object, vocab_size: int, param: str = "prompt") -> tuple[str | bytes, ...]:
    """Text, packed token ids, or several of either, told apart by their first element.

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
        return tuple(pack_tokens(checked_token_ids(part, vocab_size, param)) for part in prompt)
    return (pack_tokens(checked_token_ids(prompt, vocab_size, param)),)
