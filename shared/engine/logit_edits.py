"""Changes of the logits that a sequence asks for: bias, minimum length, penalties. Other rows are not touched."""

from __future__ import annotations

import torch

from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence


def edit_logits(logits: torch.Tensor, sequences: list[Sequence], eos_token_ids: frozenset[int]) -> None:
    """Applies every row's edits in place.

    Args:
        logits: float32 `[R, V]`.
        sequences: One per row, with sampling parameters.
        eos_token_ids: The model's own; masked, with the stop tokens, below `min_tokens`.
    """
    for row, sequence in enumerate(sequences):
        params = sequence.sampling
        if params is None:
            continue
        if params.logit_bias:
            _add_bias(logits[row], params.logit_bias)
        if sequence.num_output_tokens < params.min_tokens:
            ending = sorted(eos_token_ids | params.stop_token_ids)
            logits[row, torch.tensor(ending, dtype=torch.int64, device=logits.device)] = float("-inf")
        if params.has_penalties:
            _penalize(logits[row], sequence, params)


def _add_bias(logits: torch.Tensor, bias: dict[int, float]) -> None:
    ids = torch.tensor(list(bias), device=logits.device)
    logits[ids] += torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)


def _penalize(logits: torch.Tensor, sequence: Sequence, params: SamplingParams) -> None:
    """Repetition (Keskar et al. 2019, section 4.1) over prompt and output; presence and frequency over the output."""
    tokens = torch.tensor(sequence.token_ids, device=logits.device)
    if params.repetition_penalty != 1.0:
        seen = torch.unique(tokens)
        values, penalty = logits[seen], params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    output = tokens[sequence.num_prompt_tokens :]
    if len(output) and (params.presence_penalty or params.frequency_penalty):
        generated, counts = torch.unique(output, return_counts=True)
        logits[generated] -= params.presence_penalty + params.frequency_penalty * counts.to(logits.dtype)
