"""Chooses the tokens of a step on the device, leaving them there for the next step.

    plain rows                  -> drawn with the step itself (`kernels.triton.draw`)
    with top-k, top-p or min-p  -> `kernels.triton.sample`
    with edits or logprobs      -> the torch sampler, whose result the host waits for

Noise is the same function everywhere, so equal logits give equal tokens whichever way they go.
"""

from __future__ import annotations

import enum

import torch

from kernels import triton as ops
from shared.engine.device_step_inputs import DrawArrays, sampling_of
from shared.engine.sampler import Sampler
from shared.engine.sequence import Sequence
from shared.engine.step import StepResult


class DrawKind(enum.Enum):
    """What the rows of a step ask for together."""

    PLAIN = "plain"
    CUT = "cut"
    EDITED = "edited"


def draw_kind(sequences: list[Sequence]) -> DrawKind:
    """The least that serves every row."""
    kind = DrawKind.PLAIN
    for sequence in sequences:
        params = sampling_of(sequence)
        has_edits = params.logit_bias or params.depends_on_output or sequence.num_output_tokens < params.min_tokens
        if has_edits or params.num_logprobs is not None:
            return DrawKind.EDITED
        if not params.is_greedy and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0):
            kind = DrawKind.CUT
    return kind


class DeviceSampler:
    """Samples for one model.

    Attributes:
        tokens: int64 `[max_sequences]` on the device: the last step's, by row.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        *,
        max_sequences: int,
        max_logprobs: int,
        device: torch.device,
    ) -> None:
        self.tokens = torch.zeros(max_sequences, dtype=torch.int64, device=device)
        self._sampler = Sampler(vocab_size, eos_token_ids, max_logprobs=max_logprobs, device=device)

    def draw(self, logits: torch.Tensor, draws: DrawArrays) -> None:
        """Plain rows; needs nothing of the host, so it can be part of a captured step."""
        count = logits.shape[0]
        ops.draw(logits, draws.temperature[:count], draws.keys[:count], self.tokens[:count])

    def draw_cut(self, logits: torch.Tensor, draws: DrawArrays) -> None:
        """Rows of which some cut the distribution."""
        rows = draws.rows(logits.shape[0])
        tokens, _ = ops.sample(
            logits, temperature=rows.temperature, keys=rows.keys, top_k=rows.top_k, top_p=rows.top_p, min_p=rows.min_p
        )
        self.tokens[: logits.shape[0]].copy_(tokens)

    def draw_edited(self, logits: torch.Tensor, sequences: list[Sequence]) -> StepResult:
        """Rows of any kind; waits for the device and may overwrite the logits."""
        self._sampler.begin(sequences)  # while the device computes the logits
        result = self._sampler.sample(logits, sequences)
        self.tokens[: len(sequences)].copy_(torch.tensor(result.token_ids))
        return result
