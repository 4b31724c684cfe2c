"""How many prompt tokens fit into a step that must not take long."""

from __future__ import annotations

from shared.engine.step import StepBatch

MIN_CHUNK_TOKENS = 32  # fewer cost a step about as much

_HALF_LIFE_TOKENS = 256  # prompt tokens after which half of the estimate is younger
_MIN_WEIGHT = 0.25  # of a chunk, however short: a first estimate that was far off is not kept for long
_DECODE_WEIGHT = 0.1
_MAX_SURPRISE = 2.0


class PrefillPace:
    """Bounds a step's prompt tokens by time, from what the steps before took. Guarded by the engine's lock.

    A step cannot be interrupted. A cancel takes effect at its end, and each sequence that decodes waits for it: what
    bounds both is the time that the prompt chunks beside them take, which differs by model, machine and neighbours.

    A step with prompts may take `max_step_s`, or twice as long as one without where that is longer: on a machine whose
    decode steps alone take that long, prompts must still get on. No step, however long it took, changes an estimate by
    more than a factor of `_MAX_SURPRISE`: a process that was stopped for a while is as fast afterwards as before.

    Args:
        max_step_s: 0 = no bound.
        min_tokens: Always allowed; chunks shorter than that teach nothing, because most of their time is overhead.
    """

    def __init__(self, max_step_s: float, min_tokens: int) -> None:
        self._max_step_s = max_step_s
        self._min_tokens = min_tokens
        self._token_s = 0.0  # per prompt token; 0 = not known yet
        self._decode_s = 0.0  # of a step without prompts

    def limit(self, num_tokens: int, *, beside_decodes: bool) -> int:
        """At most how many of `num_tokens` prompt tokens a step should compute.

        Args:
            num_tokens: That the step has room for.
            beside_decodes: Sequences decode in the same step.
        """
        if not self._max_step_s:
            return num_tokens
        if not self._token_s:
            return min(num_tokens, self._min_tokens)
        decode_s = self._decode_s if beside_decodes else 0.0
        seconds = max(self._max_step_s - decode_s, decode_s)
        return min(num_tokens, max(self._min_tokens, int(seconds / self._token_s)))

    def observe(self, batch: StepBatch, seconds: float) -> None:
        """A step took so long."""
        if not self._max_step_s:
            return
        chunks = [entry.num_new_tokens for entry in batch.scheduled if entry.num_new_tokens > 1]
        num_tokens = sum(chunks)
        if not num_tokens:
            self._decode_s = _moved(self._decode_s, seconds, _DECODE_WEIGHT)
        elif num_tokens >= self._min_tokens:
            decode_s = self._decode_s if len(chunks) < len(batch.scheduled) else 0.0
            token_s = max(seconds - decode_s, seconds / 2) / num_tokens
            weight = max(_MIN_WEIGHT, 1 - 0.5 ** (num_tokens / _HALF_LIFE_TOKENS))
            self._token_s = _moved(self._token_s, token_s, weight)


def _moved(known: float, seen: float, weight: float) -> float:
    """The estimate after one more observation; the first one counts as it is."""
    if not known:
        return seen
    return known + weight * (min(max(seen, known / _MAX_SURPRISE), known * _MAX_SURPRISE) - known)
