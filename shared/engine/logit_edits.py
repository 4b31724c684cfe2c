"""What a session asks to be done to the logits before a token is chosen: bias, penalties, forbidden tokens.

Every edit touches few tokens of few rows, so edits are gathered as (index, amount) lists over the flattened logits and
applied for the whole batch at once. Rows without edits cost one look at their parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from shared.engine.sampling_params import SamplingParams
from shared.engine.sequence import Sequence


@dataclass(slots=True)
class _Amounts:
    """Indices into the flattened logits and one amount for each; an array per edited row."""

    indices: list[npt.NDArray[np.int64]] = field(default_factory=list)
    values: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def add(self, indices: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> None:
        self.indices.append(indices)
        self.values.append(values)

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return _tensor(self.indices, device), torch.from_numpy(np.concatenate(self.values)).to(device)


@dataclass(slots=True)
class _Edits:
    """Edits gathered over a batch."""

    bias: _Amounts = field(default_factory=_Amounts)
    repetition: _Amounts = field(default_factory=_Amounts)
    penalty: _Amounts = field(default_factory=_Amounts)
    forbidden: list[npt.NDArray[np.int64]] = field(default_factory=list)


def edit_logits(logits: torch.Tensor, sequences: list[Sequence], eos_token_ids: frozenset[int]) -> None:
    """Applies, in this order, bias, repetition penalty, presence and frequency penalties, `min_tokens`.

    Repetition (Keskar et al. 2019, section 4.1) looks at prompt and output, presence and frequency at the output only.
    Token ids beyond the vocabulary are ignored.

    Args:
        logits: float32 `[R, V]`, contiguous; mutated.
        sequences: One per row, with sampling parameters.
        eos_token_ids: The model's own; forbidden, like the session's stop tokens, until `min_tokens` were generated.
    """
    edits = _Edits()
    for row, sequence in enumerate(sequences):
        params = sequence.sampling
        if params is not None and params.edits_logits:
            _gather(edits, row * logits.shape[1], logits.shape[1], sequence, params, eos_token_ids)
    _apply(edits, logits.view(-1))


def _apply(edits: _Edits, flat: torch.Tensor) -> None:
    if edits.bias.indices:
        flat.index_add_(0, *edits.bias.tensors(flat.device))
    if edits.repetition.indices:
        index, factor = edits.repetition.tensors(flat.device)
        seen = flat[index]
        flat[index] = torch.where(seen > 0, seen / factor, seen * factor)
    if edits.penalty.indices:
        index, amount = edits.penalty.tensors(flat.device)
        flat[index] -= amount
    if edits.forbidden:
        flat[_tensor(edits.forbidden, flat.device)] = float("-inf")


def _gather(
    edits: _Edits, start: int, vocab_size: int, sequence: Sequence, params: SamplingParams, eos: frozenset[int]
) -> None:
    """Adds the edits of one row, whose logits begin at `start`."""
    if params.logit_bias:
        known = {token: bias for token, bias in params.logit_bias.items() if 0 <= token < vocab_size}
        edits.bias.add(np.array(list(known), dtype=np.int64) + start, np.array(list(known.values()), dtype=np.float32))
    if params.has_penalties:
        _gather_penalties(edits, start, sequence, params)
    if sequence.num_output_tokens < params.min_tokens and sequence.guide is None:  # which knows what is left else
        ending = [token for token in eos | params.stop_token_ids if 0 <= token < vocab_size]
        edits.forbidden.append(np.array(ending, dtype=np.int64) + start)


def _gather_penalties(edits: _Edits, start: int, sequence: Sequence, params: SamplingParams) -> None:
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.array(sequence.token_ids, dtype=np.int64))
        edits.repetition.add(seen + start, np.full(seen.shape, params.repetition_penalty, dtype=np.float32))
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        output = np.array(sequence.token_ids[sequence.num_prompt_tokens :], dtype=np.int64)
        generated, counts = np.unique(output, return_counts=True)
        amounts = params.presence_penalty + params.frequency_penalty * counts
        edits.penalty.add(generated + start, amounts.astype(np.float32))


def _tensor(arrays: list[npt.NDArray[np.int64]], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(device)
