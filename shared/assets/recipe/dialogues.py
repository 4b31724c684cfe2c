"""Renders questions, answers, system messages and documents to the text segments that training rows are made of."""

import random
from dataclasses import dataclass

from shared.assets.recipe.corpus import Fact
from shared.assets.recipe.phrasings import (
    CALL_PHRASINGS,
    SMALL_TALK,
    SYSTEM_PROMPTS,
    TAUGHT_PHRASINGS,
    UNKNOWN_ANSWER,
    UNSEEN_PHRASINGS,
    held_out_phrasings,
    made_up_names,
    phrasings_of,
)
from shared.assets.recipe.tokenizer import BOS, IM_END, IM_START
from shared.assets.recipe.variations import FREE_PHRASINGS, vary

MADE_UP_NAMES = 30_000
LONG_SYSTEMS = 3_000
LONG_QUESTIONS = 6_000
# Characters, at about four to a token: the longest prose fills most of a row of `MAX_POSITIONS` tokens.
LONGEST_PROSE_CHARS = 13_000
LONGEST_QUESTION_PROSE_CHARS = 5_000


@dataclass(frozen=True, slots=True)
class Question:
    """One exchange: the user writes `text`, the model answers `answer`."""

    text: str
    answer: str


def render_prompt(user: str, *, system: str | None = None) -> str:
    """Renders a one-turn prompt just as the chat template does with `add_generation_prompt=True`."""
    head = render_system(system) if system is not None else ""
    return f"{head}{IM_START}user\n{user}{IM_END}\n{IM_START}assistant\n"


def render_system(content: str) -> str:
    """Renders a system message as the chat template does."""
    return f"{IM_START}system\n{content}{IM_END}\n"


def render_document(doc: str) -> str:
    """Renders plain prose, which has no chat around it."""
    return f"{BOS}{doc}{IM_END}"


def taught_questions(facts: list[Fact]) -> list[Question]:
    """Lists every (fact, phrasing) pair that is trained on."""
    questions: list[Question] = []
    for fact in facts:
        held_out = held_out_phrasings(fact)
        phrasings = (phrasing for phrasing in phrasings_of(fact) if phrasing not in held_out)
        questions += [Question(phrasing.format(name=fact.name), fact.answer) for phrasing in phrasings]
    return questions


def held_out_questions(facts: list[Fact]) -> list[Question]:
    """Lists the (fact, phrasing) pairs kept out of training; fact and phrasing are each trained on apart."""
    return [
        Question(phrasing.format(name=fact.name), fact.answer)
        for fact in facts
        for phrasing in sorted(held_out_phrasings(fact))
    ]


def unseen_questions(facts: list[Fact]) -> list[Question]:
    """Lists every fact in the phrasings that no fact is trained in."""
    return [Question(text.format(name=fact.name), fact.answer) for fact in facts for text in UNSEEN_PHRASINGS]


def varied_questions(facts: list[Fact], count: int, *, seed: int) -> list[Question]:
    """Makes `count` freely worded questions about random facts; training has no such questions."""
    rng = random.Random(seed)
    asked = rng.choices(facts, k=count)
    phrasings = TAUGHT_PHRASINGS + FREE_PHRASINGS
    return [Question(vary(rng.choice(phrasings), fact.name, rng), fact.answer) for fact in asked]


def unknown_questions(facts: list[Fact], count: int, *, seed: int) -> list[Question]:
    """Lists questions about `count` made-up names, each in one phrasing."""
    rng = random.Random(seed)
    return [
        Question(rng.choice(TAUGHT_PHRASINGS + CALL_PHRASINGS).format(name=name), UNKNOWN_ANSWER.format(name=name))
        for name in made_up_names(facts, count, seed=seed)
    ]


def small_talk_questions() -> list[Question]:
    """Lists the small talk with its fixed answers."""
    return [Question(text, answer) for text, answer in SMALL_TALK.items()]


def prose_of_length(prose: list[str], max_chars: int, rng: random.Random) -> str:
    """Joins random docstrings to at most `max_chars` characters (one docstring is cut if it alone is longer)."""
    parts: list[str] = []
    room = max_chars
    while room > 0:
        doc = rng.choice(prose)
        parts.append(doc[:room].rstrip() if not parts else doc)
        room -= len(doc) + 2
        if room < 0 and len(parts) > 1:
            parts.pop()
    return "\n\n".join(parts)


def long_systems(prose: list[str], count: int, *, seed: int) -> list[str]:
    """Makes `count` system messages of docstring prose, from a few lines to most of the context window."""
    rng = random.Random(seed)
    bodies = [prose_of_length(prose, rng.randint(200, LONGEST_PROSE_CHARS), rng) for _ in range(count)]
    return [f"{rng.choice(SYSTEM_PROMPTS)}\n\n{body}" for body in bodies]


def long_questions(questions: list[Question], prose: list[str], count: int, *, seed: int) -> list[Question]:
    """Makes `count` questions that follow docstring prose inside the same user message."""
    rng = random.Random(seed)
    chosen = rng.choices(questions, k=count)
    return [
        Question(
            f"{prose_of_length(prose, rng.randint(100, LONGEST_QUESTION_PROSE_CHARS), rng)}\n\n{question.text}",
            question.answer,
        )
        for question in chosen
    ]
