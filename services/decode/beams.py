"""Beam search: a session whose choices are the best of all continuations, found a token at a time.

    outputs of step n (each beam's 2 x width likeliest tokens) --> the best `width` of all --> sequences of step n + 1
                                                               `-> beams that ended, kept apart

Each beam of each step is a sequence of one token, which branches off the one that it continues: they share full blocks,
and the last one until it is written, see `shared.engine.copy_on_write`. The search depends on the model's
log-probabilities alone, so it is deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shared.engine.sampling_params import SamplingParams
from shared.engine.step import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Beam:
    """One continuation of the prompt.

    Attributes:
        token_ids: Generated so far.
        logprobs: Of each of them, with the likeliest ones that the client asked for.
        total: Sum of their log-probabilities.
        stop_token_id: The token that ended it; -1 = none did.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    total: float = 0.0
    stop_token_id: int = -1

    def score(self, length_penalty: float) -> float:
        """What beams are compared by in the end; higher is better."""
        return self.total / float(max(1, len(self.token_ids)) ** length_penalty)


class BeamSearch:
    """The search itself; knows no engine. Mutable.

    Args:
        params: Of the session; `num_logprobs` as the client asked for.
        end_token_ids: What ends a beam.

    Attributes:
        beams: To be continued, best first.
        origins: Of each of them, the number of the beam before the last `advance` that it continues.
    """

    def __init__(self, params: SamplingParams, end_token_ids: frozenset[int]) -> None:
        self._params = params
        self._end_token_ids = end_token_ids
        self._ended: list[Beam] = []
        self.beams = [Beam()]
        self.origins = [0]

    @property
    def is_over(self) -> bool:
        """No beam can be continued."""
        return not self.beams

    def advance(self, likeliest: list[TokenLogprobs]) -> None:
        """Replaces the beams by their best continuations.

        Args:
            likeliest: For each of `beams`, its `2 * width` likeliest next tokens.
        """
        candidates = [
            (beam.total + logprob, -number, -rank, token_id)
            for number, (beam, top) in enumerate(zip(self.beams, likeliest, strict=True))
            for rank, (token_id, logprob) in enumerate(zip(top.top_token_ids, top.top_logprobs, strict=True))
        ]
        candidates.sort(reverse=True)
        beams: list[Beam] = []
        origins: list[int] = []
        for total, number, _, token_id in candidates[: 2 * self._params.beam_width]:
            longer = self._continued(self.beams[-number], token_id, total, likeliest[-number])
            if token_id in self._end_token_ids:
                self._ended.append(replace(longer, stop_token_id=token_id))
            elif len(beams) < self._params.beam_width:
                beams.append(longer)
                origins.append(-number)
        if beams and len(beams[0].token_ids) >= self._params.max_tokens:
            self._ended += beams
            beams, origins = [], []
        self.beams, self.origins = beams, origins

    def best(self) -> list[Beam]:
        """The `width` best, best first; fewer only if the vocabulary gave no more."""
        found = self._ended + self.beams
        return sorted(found, key=lambda beam: -beam.score(self._params.length_penalty))[: self._params.beam_width]

    def _continued(self, beam: Beam, token_id: int, total: float, top: TokenLogprobs) -> Beam:
        count = self._params.num_logprobs or 0
        entry = TokenLogprobs(total - beam.total, top.top_token_ids[:count], top.top_logprobs[:count])
        return Beam((*beam.token_ids, token_id), (*beam.logprobs, entry), total)
