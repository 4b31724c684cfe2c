"""Draws tokens from softmax distributions, whole or cut by top-k, top-p and min-p.

The three cuts are one threshold on the logits: top-k first, top-p over what it left, min-p against the likeliest token.
Tokens that tie with the last one kept are kept too, so the set does not depend on the order of a sort.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shared.engine.noise import gumbel_noise, token_steps

NUM_CANDIDATES = 256
"""Likeliest tokens looked at first; rows whose cut lies below them are sorted whole. Never changes what is drawn."""


@dataclass(frozen=True, slots=True)
class Cuts:
    """Per row, on the logits' device.

    Attributes:
        top_k: int64 `[R]`; 0 is off.
        top_p: float64 `[R]`; 1 is off.
        min_p: float32 `[R]`; 0 is off.
    """

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    def rows(self, index: torch.Tensor) -> Cuts:
        """Those of some rows."""
        return Cuts(self.top_k[index], self.top_p[index], self.min_p[index])


def draw(logits: torch.Tensor, keys: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """One token per row from the whole softmax.

    Args:
        logits: float32 `[R, V]`, temperature applied; -inf forbids a token.
        keys: int64 `[R]`, from `noise_keys`.
        steps: int64 `[V]`, `token_steps` of the vocabulary.

    Returns:
        int64 `[R]`.
    """
    return gumbel_noise(keys, steps).add_(logits).argmax(dim=-1)


def draw_truncated(logits: torch.Tensor, keys: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """One token per row from the softmax over the tokens that the cuts leave; arguments and result as in `draw`."""
    vocab_size = logits.shape[1]
    tokens, settled = _draw_from_likeliest(logits, keys, cuts, min(NUM_CANDIDATES, vocab_size))
    if not bool(settled.all()):
        rows = (~settled).nonzero().squeeze(1)
        tokens[rows], _ = _draw_from_likeliest(logits[rows], keys[rows], cuts.rows(rows), vocab_size)
    return tokens


def _draw_from_likeliest(
    logits: torch.Tensor, keys: torch.Tensor, cuts: Cuts, num_candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws among the likeliest tokens; the second result says for which rows the cut lies among them."""
    values, token_ids = logits.topk(num_candidates, dim=-1)
    threshold = _threshold(logits, values, cuts)
    scores = (values + gumbel_noise(keys, token_steps(token_ids))).masked_fill_(values < threshold, float("-inf"))
    tokens = token_ids.gather(1, scores.argmax(dim=-1, keepdim=True)).squeeze(1)
    if num_candidates == logits.shape[1]:
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    return tokens, (values[:, -1:] < threshold).squeeze(1) & (cuts.top_k <= num_candidates)


def _threshold(logits: torch.Tensor, values: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """Smallest logit kept, float32 `[R, 1]`, given the likeliest ones `values` `[R, K]` in descending order."""
    likeliest = values[:, :1]
    has_top_k = cuts.top_k[:, None] > 0
    last_of_k = cuts.top_k.clamp(1, values.shape[1])[:, None] - 1
    by_count = values.gather(1, last_of_k).masked_fill_(~has_top_k, float("-inf"))
    # Double precision, so that the sums do not depend on how many candidates there are.
    weights = (values - likeliest).double().exp_().masked_fill_(values < by_count, 0.0)
    mass = weights.cumsum(dim=-1)
    everything = (logits.logsumexp(dim=-1, keepdim=True) - likeliest).double().exp_()
    total = torch.where(has_top_k, mass[:, -1:], everything)
    in_nucleus = (mass - weights < cuts.top_p[:, None] * total) & (values >= by_count)
    last_of_nucleus = in_nucleus.sum(dim=-1, keepdim=True).clamp_(min=1) - 1
    by_mass = values.gather(1, last_of_nucleus).masked_fill_(cuts.top_p[:, None] >= 1.0, float("-inf"))
    by_ratio = likeliest + cuts.min_p[:, None].log()
    return torch.maximum(torch.maximum(by_count, by_mass), by_ratio)
