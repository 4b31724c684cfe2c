"""How much slower sequences decode while a prompt of theirs is prefilled elsewhere, measured.

On machines of their own, a prefill and a decode worker do not feel each other. On shared cores, memory channels or a
shared device, a prompt sent away comes back as slower steps: what sending it away was to spare. No description of the
machine says by how much; the steps do.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_WEIGHT = 0.02  # of the latest step without a neighbour, per number of sequences
_DECAY = 0.995  # per step beside a neighbour
_MIN_STEPS = 20  # before what they say counts
_HALF_LIFE_S = 60.0
"""What was dear is avoided, and so not measured again: it is forgotten, and tried anew."""


class NeighbourSlowdown:
    """Compares steps that only decode, beside a remote prefill and without, for equal numbers of sequences.

    Guarded by the engine's lock.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._measured_s = 0.0
        self._alone_s: dict[int, float] = {}
        self._beside_s = 0.0
        self._expected_s = 0.0
        self._num_beside = 0

    def observe(self, seconds: float, num_sequences: int, *, is_beside: bool) -> None:
        """A step that decoded and computed no prompt is over.

        Args:
            seconds: It took.
            num_sequences: In it.
            is_beside: A sequence of this worker waited for KV from elsewhere meanwhile.
        """
        alone_s = self._alone_s.get(num_sequences)
        if not is_beside:
            self._alone_s[num_sequences] = seconds if alone_s is None else alone_s + _WEIGHT * (seconds - alone_s)
        elif alone_s is not None:
            self._beside_s = _DECAY * self._beside_s + seconds
            self._expected_s = _DECAY * self._expected_s + alone_s
            self._num_beside += 1
            self._measured_s = self._clock()

    @property
    def factor(self) -> float:
        """A step takes so many times as long, at least 1; 1.0 until it is known."""
        if self._num_beside < _MIN_STEPS:
            return 1.0
        remembered: float = 0.5 ** ((self._clock() - self._measured_s) / _HALF_LIFE_S)
        return 1 + max(0.0, self._beside_s / self._expected_s - 1) * remembered
