"""Log-probabilities of a prompt's own tokens, a few rows of logits at a time, so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from shared.engine.step import PromptScores, ScheduledSequence, StepBatch

_ROWS = 64
"""Rows of logits at a time: 39 MB in float32 for a vocabulary of 152,000 tokens."""


def score_prompts(
    batch: StepBatch, hidden: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[PromptScores]:
    """Scores what a step computed of the prompts that want it.

    Args:
        batch: The step.
        hidden: `[T, hidden]` of its tokens.
        logits: The model's head.
    """
    first = 0
    for item in batch.scheduled:
        last = first + item.num_new_tokens
        if item.sequence.is_scoring and (scores := score_prompt(item, hidden[first:last], logits)):
            yield scores
        first = last


def score_prompt(
    item: ScheduledSequence, hidden: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor]
) -> PromptScores | None:
    """Scores the prompt tokens that follow the step's tokens of one sequence; None if there are none left to score.

    Args:
        item: What the step computed of a sequence that wants its prompt scored.
        hidden: `[item.num_new_tokens, hidden]`.
        logits: The model's head.
    """
    sequence = item.sequence
    begin = max(item.num_computed, sequence.num_scored_tokens)
    end = min(item.num_computed + item.num_new_tokens, sequence.num_prompt_tokens - 1)
    if sequence.num_prompt_logprobs is None or begin >= end:
        return None
    scores = PromptScores(sequence)
    for first in range(begin, end, _ROWS):
        last = min(first + _ROWS, end)
        rows = hidden[first - item.num_computed : last - item.num_computed].contiguous()
        next_tokens = torch.tensor(sequence.token_ids[first + 1 : last + 1], device=hidden.device)
        _append(scores, logits(rows).float(), next_tokens, sequence.num_prompt_logprobs)
    return scores


def _append(scores: PromptScores, logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> None:
    total = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, tokens[:, None])
    top, top_ids = logits.topk(min(num_top, logits.shape[1]), dim=-1)
    scores.logprobs.extend((chosen - total).squeeze(1).tolist())
    scores.ranks.extend(((logits > chosen).sum(dim=-1) + 1).tolist())
    scores.top_token_ids.extend(top_ids.tolist())
    scores.top_logprobs.extend((top - total).tolist())
