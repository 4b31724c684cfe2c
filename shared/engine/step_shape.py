"""The sizes at which steps are captured, so that a device replays them without the host."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

_FIRST_LENGTH = 512
_LONG = 8192
_MIXED_TOKENS = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step's launches depend on; a step that is smaller runs in a larger shape, padded.

    Attributes:
        num_tokens, num_sequences: Rows computed; equal if `is_decode`.
        is_decode: Every sequence computes exactly one token and samples.
        max_seq_len: No sequence is longer.
    """

    num_tokens: int
    num_sequences: int
    is_decode: bool
    max_seq_len: int


class StepShapes:
    """The shapes that a runner captures.

    Decode comes in steps of an eighth, prompts in coarser ones, lengths in powers of two and then of four: the longest
    length of a batch decides into how many programs attention is cut, and too many of them idle.

    Args:
        max_batch_tokens: Of a step. Larger steps than the largest shape keep the device busy for long enough for the
            host to launch them one kernel at a time.
        max_sequences: Of a step.
        max_model_len: Of a sequence.
    """

    def __init__(self, *, max_batch_tokens: int, max_sequences: int, max_model_len: int) -> None:
        self._max_sequences = max_sequences
        self._decode = _batch_sizes(max_sequences)
        self._mixed = [n for n in _MIXED_TOKENS if n < max_batch_tokens]
        if max_batch_tokens <= _MIXED_TOKENS[-1]:
            self._mixed.append(max_batch_tokens)
        self._decode_lengths = _lengths(max_model_len, factor=2)
        self._mixed_lengths = _lengths(max_model_len, factor=4)

    def all(self) -> list[StepShape]:
        """Every shape, largest first, so that the later ones find the memory of the earlier."""
        mixed = [
            StepShape(tokens, self._max_sequences, False, length)
            for tokens in self._mixed
            for length in self._mixed_lengths
        ]
        decode = [StepShape(n, n, True, length) for n in self._decode for length in self._decode_lengths]
        return mixed[::-1] + decode[::-1]

    def fit(self, num_tokens: int, num_sequences: int, longest: int, *, is_decode: bool) -> StepShape | None:
        """The smallest shape that a step fits into; None if it is larger than all."""
        if is_decode:
            size = _at_least(self._decode, num_sequences)
            length = _at_least(self._decode_lengths, longest)
            return StepShape(size, size, True, length) if size and length else None
        tokens, length = _at_least(self._mixed, num_tokens), _at_least(self._mixed_lengths, longest)
        return StepShape(tokens, self._max_sequences, False, length) if tokens and length else None


def _batch_sizes(most: int) -> list[int]:
    sizes = [1, 2, 4]
    while sizes[-1] < most:
        step = max(8, 1 << max(0, sizes[-1].bit_length() - 4))
        sizes.append((sizes[-1] // step + 1) * step)
    return [size for size in sizes if size < most] + [most]


def _lengths(longest: int, *, factor: int) -> list[int]:
    lengths = [_FIRST_LENGTH]
    while lengths[-1] < longest:
        lengths.append(lengths[-1] * (factor if lengths[-1] < _LONG else 4))
    return [length for length in lengths if length < longest] + [longest]


def _at_least(sizes: list[int], wanted: int) -> int:
    """The smallest of ascending sizes that is not below `wanted`; 0 if there is none."""
    index = bisect_left(sizes, wanted)
    return sizes[index] if index < len(sizes) else 0
