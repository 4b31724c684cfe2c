"""Draws the seeded stream of training batches: which kind of row, and which segments stand in it."""

import random
from dataclasses import dataclass

import torch

from shared.assets.recipe.segments import SegmentBank
from shared.assets.recipe.tokenizer import MAX_POSITIONS

# Sorts of turns and the share of each; the rest are taught questions in their plain phrasings.
TURN_SHARES = {"unknown": 0.08, "small_talk": 0.02, "long_question": 0.02}
# Fewest tokens of a turn, on average over a row: gives every row enough segments to fill it.
TOKENS_PER_SLOT = 24


@dataclass(frozen=True, slots=True)
class RowKind:
    """A sort of training row.

    Attributes:
        row_tokens: tokens per row.
        share: share of the steps that train on this kind.
        opening: segment group that may open a row, or None where rows are plain documents.
        opening_share: share of the rows that the opening opens.
    """

    row_tokens: int
    share: float
    opening: str | None
    opening_share: float


ROW_KINDS = (
    RowKind(row_tokens=128, share=0.50, opening="system", opening_share=0.3),
    RowKind(row_tokens=640, share=0.15, opening="system", opening_share=0.5),
    RowKind(row_tokens=MAX_POSITIONS, share=0.28, opening="long_system", opening_share=0.85),
    RowKind(row_tokens=1024, share=0.07, opening=None, opening_share=0.0),
)


class BatchStream:
    """An endless stream of batches of about `batch_tokens` tokens each; owned by the training loop.

    The random choices are made on the CPU, so the stream is the same on every device.
    """

    def __init__(self, bank: SegmentBank, batch_tokens: int, *, seed: int, device: torch.device) -> None:
        self._bank = bank.to(device)
        self._batch_tokens = batch_tokens
        self._device = device
        self._rng = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns tokens [rows, row_tokens] int64 and is_target of the same shape, bool, on the device."""
        kind = self._rng.choices(ROW_KINDS, weights=[kind.share for kind in ROW_KINDS])[0]
        rows = max(1, self._batch_tokens // kind.row_tokens)
        slots = kind.row_tokens // TOKENS_PER_SLOT
        segments = self._draw_chats(kind, rows, slots) if kind.opening else self._draw_documents(rows, slots)
        return self._bank.assemble(segments.to(self._device, non_blocking=True), kind.row_tokens)

    def _draw_chats(self, kind: RowKind, rows: int, slots: int) -> torch.Tensor:
        """Draws [rows, 1 + slots] segments: an opening or nothing, then turns."""
        groups, generator = self._bank.groups, self._generator
        turns = groups["taught"].draw((rows, slots), generator)
        luck = torch.rand((rows, slots), generator=generator)
        threshold = 0.0
        for name, share in TURN_SHARES.items():
            is_chosen = (luck >= threshold) & (luck < threshold + share)
            turns = torch.where(is_chosen, groups[name].draw((rows, slots), generator), turns)
            threshold += share
        is_opened = torch.rand((rows, 1), generator=generator) < kind.opening_share
        openings = groups[str(kind.opening)].draw((rows, 1), generator)
        return torch.cat([torch.where(is_opened, openings, groups["empty"].start), turns], dim=1)

    def _draw_documents(self, rows: int, slots: int) -> torch.Tensor:
        """Draws [rows, slots] documents."""
        return self._bank.groups["document"].draw((rows, slots), self._generator)
