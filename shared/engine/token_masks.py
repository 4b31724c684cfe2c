"""Works out, beside the forward pass, which tokens the guided rows of a step may be, and applies it to all at once."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from shared.engine.output_guide import OutputGuide
from shared.engine.sequence import Sequence


class TokenMasks:
    """Owned by the runner: `begin` before the forward pass, `apply` after it; a step at a time.

    A guide is touched by this thread only between the two, when its sequence's tokens stand still.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._num_words = -(-vocab_size // 32)
        self._device = device
        self._shifts = torch.arange(32, dtype=torch.int32, device=device)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="token-masks")
        self._rows: list[int] = []
        self._masks: Future[torch.Tensor] | None = None

    def begin(self, sequences: list[Sequence]) -> None:
        """Starts on the masks of the sequences that sample; costs next to nothing where none is guided."""
        guided = [(row, s, s.guide) for row, s in enumerate(sequences) if s.guide is not None]
        self._rows = [row for row, _, _ in guided]
        work = [(guide, sequence) for _, sequence, guide in guided]
        self._masks = self._threads.submit(self._fill, work) if work else None

    def apply(self, logits: torch.Tensor) -> None:
        """Sets what may not follow to minus infinity.

        Args:
            logits: float32 `[R, V]` of the sequences given to `begin`; mutated.
        """
        if self._masks is None:
            return
        words, self._masks = self._masks.result().to(self._device), None
        is_allowed = (words.unsqueeze(-1) >> self._shifts).bitwise_and_(1).flatten(1)[:, : logits.shape[1]].bool()
        if len(self._rows) == logits.shape[0]:
            logits.masked_fill_(~is_allowed, float("-inf"))
        else:
            index = torch.tensor(self._rows, device=self._device)
            logits[index] = logits[index].masked_fill_(~is_allowed, float("-inf"))

    def _fill(self, work: list[tuple[OutputGuide, Sequence]]) -> torch.Tensor:
        """int32 `[guided rows, ceil(V / 32)]`; compiled code without the GIL, but for following the tokens."""
        words = np.zeros((len(work), self._num_words), dtype=np.uint32)
        for row, (guide, sequence) in zip(words, work, strict=True):
            guide.fill(sequence.token_ids[sequence.num_prompt_tokens :], row)
        return torch.from_numpy(words.view(np.int32))
