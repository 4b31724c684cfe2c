"""Protobuf to dataclasses and back, for the decode servicer."""

from __future__ import annotations

from protos import worker_pb2 as pb
from shared.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from shared.engine.sequence import FinishReason
from shared.engine.step import PromptScores, TokenLogprobs
from shared.engine.thinking import Thinking
from shared.errors import InvalidRequest

FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: pb.FINISH_REASON_ABORT,
}


def sampling_from_wire(wire: pb.SamplingParams) -> SamplingParams:
    """Checks the few things that the engine relies on; the gateway has told the user about all others.

    Raises:
        InvalidRequest: A bound that the engine needs does not hold.
    """
    if wire.max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {wire.max_tokens}, must be at least 1", param="max_tokens")
    if wire.num_logprobs > MAX_LOGPROBS:
        raise InvalidRequest(f"logprobs is {wire.num_logprobs}, at most {MAX_LOGPROBS}", param="logprobs")
    if wire.num_prompt_logprobs > MAX_LOGPROBS:
        raise InvalidRequest(
            f"prompt_logprobs is {wire.num_prompt_logprobs}, at most {MAX_LOGPROBS}", param="prompt_logprobs"
        )
    return SamplingParams(
        max_tokens=wire.max_tokens,
        temperature=wire.temperature,
        top_p=wire.top_p,
        top_k=wire.top_k,
        min_p=wire.min_p,
        seed=wire.seed,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        repetition_penalty=wire.repetition_penalty,
        logit_bias=dict(wire.logit_bias),
        min_tokens=wire.min_tokens,
        stop_token_ids=frozenset(wire.stop_token_ids),
        ignore_eos=wire.ignore_eos,
        num_logprobs=wire.num_logprobs if wire.HasField("num_logprobs") else None,
        allowed_token_ids=(frozenset(wire.allowed_token_ids.ids) if wire.HasField("allowed_token_ids") else None),
        bad_words=tuple(tuple(word.ids) for word in wire.bad_words if word.ids),
        grammar=wire.grammar,
        thinking=_thinking_from_wire(wire.thinking) if wire.HasField("thinking") else None,
        num_prompt_logprobs=wire.num_prompt_logprobs if wire.HasField("num_prompt_logprobs") else None,
        beam_width=wire.beam_width,
        length_penalty=wire.length_penalty,
    )


def _thinking_from_wire(wire: pb.Thinking) -> Thinking:
    if not wire.end_ids:
        raise InvalidRequest("reasoning without a mark that ends it")
    return Thinking(
        start_id=wire.start_id,
        end_ids=tuple(wire.end_ids),
        is_open=wire.is_open,
        max_tokens=wire.max_tokens if wire.HasField("max_tokens") else None,
    )


def prompt_scores_to_wire(number: int, scores: PromptScores) -> pb.PromptScores:
    """`number` is the sequence's in its stream."""
    return pb.PromptScores(
        sequence=number,
        logprobs=scores.logprobs,
        ranks=scores.ranks,
        num_top=len(scores.top_token_ids[0]) if scores.top_token_ids else 0,
        top_token_ids=[token_id for row in scores.top_token_ids for token_id in row],
        top_logprobs=[logprob for row in scores.top_logprobs for logprob in row],
    )


def logprobs_to_wire(index: int, logprobs: TokenLogprobs) -> pb.TokenLogprobs:
    """`index` says which token of the step's message it belongs to."""
    return pb.TokenLogprobs(
        index=index,
        logprob=logprobs.logprob,
        top_token_ids=logprobs.top_token_ids,
        top_logprobs=logprobs.top_logprobs,
    )
