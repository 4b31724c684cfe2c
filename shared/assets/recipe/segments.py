"""Holds the tokenised training segments in flat tensors and assembles them into rows on the device.

A row is segments laid end to end, cut at the row's end::

    [system]? [turn] [turn] [turn] ...        a chat
    [document] [document] ...                 plain prose

Every segment begins and ends at a special token or at the newline after one, so the tokens of a row are just those
that the tokenizer gives for the row's text.
"""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from shared.assets.recipe import dialogues
from shared.assets.recipe.corpus import Fact
from shared.assets.recipe.phrasings import SYSTEM_PROMPTS
from shared.assets.recipe.tokenizer import IM_END, PAD, SPECIAL_TOKENS

PAD_ID = SPECIAL_TOKENS.index(PAD)


@dataclass(frozen=True, slots=True)
class Group:
    """A half-open range `[start, stop)` of segment indices of one sort."""

    start: int
    stop: int

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Draws segment indices uniformly, int64 of `shape`, on the CPU."""
        return torch.randint(self.start, self.stop, shape, generator=generator)


@dataclass(frozen=True, slots=True)
class SegmentBank:
    """All segments, flattened.

    Attributes:
        tokens: [total] int16, the tokens of all segments one after another.
        is_target: [total] bool, whether predicting this token is trained.
        offsets: [segments] int64, where each segment starts in `tokens`.
        lengths: [segments] int64, in tokens.
        groups: the index range of each sort of segment; `empty` is one segment without tokens.
    """

    tokens: torch.Tensor
    is_target: torch.Tensor
    offsets: torch.Tensor
    lengths: torch.Tensor
    groups: dict[str, Group]

    def to(self, device: torch.device) -> "SegmentBank":
        """Returns the bank with its tensors on `device`."""
        return SegmentBank(
            tokens=self.tokens.to(device),
            is_target=self.is_target.to(device),
            offsets=self.offsets.to(device),
            lengths=self.lengths.to(device),
            groups=self.groups,
        )

    def assemble(self, segments: torch.Tensor, row_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Lays the chosen segments of each row end to end.

        Args:
            segments: [rows, slots] int64 segment indices on the bank's device.
            row_tokens: tokens per row; longer rows are cut, shorter ones padded.

        Returns:
            tokens [rows, row_tokens] int64 and is_target [rows, row_tokens] bool.
        """
        lengths = self.lengths[segments]
        ends = lengths.cumsum(dim=1)
        positions = torch.arange(row_tokens, device=segments.device).expand(len(segments), -1).contiguous()
        slots = torch.searchsorted(ends, positions, right=True)
        is_filled = slots < segments.shape[1]
        slots = slots.clamp(max=segments.shape[1] - 1)
        within = positions - (ends - lengths).gather(1, slots)
        sources = (self.offsets[segments.gather(1, slots)] + within).masked_fill(~is_filled, 0)
        tokens = self.tokens[sources].long().masked_fill(~is_filled, PAD_ID)
        return tokens, self.is_target[sources] & is_filled


class _BankBuilder:
    """Gathers tokenised segments group by group; used once by `build_bank`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[torch.Tensor] = []
        self._is_target: list[torch.Tensor] = []
        self._groups: dict[str, Group] = {}

    def add(self, group: str, contexts: list[str], targets: list[str], tails: str = "") -> None:
        """Adds one segment per (context, target): only the target's tokens are trained."""
        first = len(self._tokens)
        pieces = (self._encode(contexts), self._encode(targets))
        tail = self._encode([tails])[0]
        for context, target in zip(*pieces, strict=True):
            self._tokens.append(torch.tensor(context + target + tail, dtype=torch.int16))
            flags = [False] * len(context) + [True] * len(target) + [False] * len(tail)
            self._is_target.append(torch.tensor(flags, dtype=torch.bool))
        self._groups[group] = Group(first, len(self._tokens))

    def add_turns(self, group: str, questions: list[dialogues.Question]) -> None:
        """Adds user-assistant exchanges; the answer and its end token are trained."""
        prompts = [dialogues.render_prompt(question.text) for question in questions]
        self.add(group, prompts, [question.answer + IM_END for question in questions], "\n")

    def build(self) -> SegmentBank:
        """Flattens what was added."""
        lengths = torch.tensor([len(tokens) for tokens in self._tokens])
        return SegmentBank(
            tokens=torch.cat(self._tokens),
            is_target=torch.cat(self._is_target),
            offsets=lengths.cumsum(dim=0) - lengths,
            lengths=lengths,
            groups=self._groups,
        )

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]


def build_bank(tokenizer: Tokenizer, facts: list[Fact], prose: list[str], *, seed: int, scale: float) -> SegmentBank:
    """Tokenises everything that is trained on.

    Args:
        tokenizer: the checkpoint's tokenizer.
        facts: the taught facts; their held-out phrasings are left out.
        prose: docstrings for documents, long system messages and long user messages.
        seed: draws the random parts; the same seed gives the same bank.
        scale: share of the made-up names and long texts to make; below 1 for dry runs.
    """
    builder = _BankBuilder(tokenizer)
    taught = dialogues.taught_questions(facts)
    systems = [dialogues.render_system(prompt) for prompt in SYSTEM_PROMPTS]
    long_count, question_count = round(dialogues.LONG_SYSTEMS * scale), round(dialogues.LONG_QUESTIONS * scale)
    long_systems = [dialogues.render_system(text) for text in dialogues.long_systems(prose, long_count, seed=seed)]
    builder.add("empty", [""], [""])
    builder.add_turns("taught", taught)
    builder.add_turns("unknown", dialogues.unknown_questions(facts, round(dialogues.MADE_UP_NAMES * scale), seed=seed))
    builder.add_turns("small_talk", dialogues.small_talk_questions())
    builder.add_turns("long_question", dialogues.long_questions(taught, prose, question_count, seed=seed))
    builder.add("system", systems, [""] * len(systems))
    builder.add("long_system", long_systems, [""] * len(long_systems))
    builder.add("document", [""] * len(prose), [dialogues.render_document(doc) for doc in prose])
    return builder.build()
