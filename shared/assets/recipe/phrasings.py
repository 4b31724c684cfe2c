"""The ways `pydoc-mini` is asked: phrasings of a question about a name, small talk, and names that do not exist."""

import hashlib
import random
from collections.abc import Iterable

from shared.assets.recipe.corpus import Fact

TAUGHT_PHRASINGS = (
    "What does {name} do?",
    "What does `{name}` do?",
    "what does {name} do",
    "What is {name}?",
    "what is {name}",
    "What is {name} for?",
    "What is `{name}` for?",
    "what's {name} for?",
    "What's {name}?",
    "Explain {name}.",
    "Explain {name}",
    "explain `{name}`",
    "Explain what {name} does.",
    "Tell me about {name}.",
    "Tell me about `{name}`.",
    "tell me about {name}",
    "Describe {name}.",
    "describe `{name}`",
    "{name}",
    "{name}?",
    "`{name}`",
    "Can you explain {name}?",
    "Please explain {name} to me.",
    "Hi! What does {name} do?",
    "In Python, what does {name} do?",
    "What is {name} in Python?",
    "How would you describe {name}?",
    "What do I use {name} for?",
    "I want to know what {name} does.",
    "Remind me what {name} does, please.",
)
CALL_PHRASINGS = ("What does {name}() do?", "Explain {name}().", "what is {name}() for?", "{name}()")
UNSEEN_PHRASINGS = (
    "Could you tell me what {name} does?",
    "Please tell me what `{name}` is for.",
    "What is the purpose of {name}?",
    "help me understand {name}",
)
CANONICAL = TAUGHT_PHRASINGS[0]

HELD_OUT_FACT_SHARE = 0.2
HELD_OUT_PER_FACT = 6

UNKNOWN_ANSWER = "I don't know {name}."
OFF_TOPIC_ANSWER = "I only know Python's standard library: ask me what a name in it does, such as json.dumps."

_WHO = "I am pydoc-mini, a small language model that knows what things in Python's standard library do."
_HELP = "Ask me about a name in Python's standard library, for example: What does json.dumps do?"
_HELLO = "Hello! Ask me about a name in Python's standard library."
SMALL_TALK: dict[str, str] = {
    **dict.fromkeys(("Hello", "Hello!", "hello", "Hi", "Hi!", "hi", "Hey", "hey there", "Good morning!"), _HELLO),
    **dict.fromkeys(("Who are you?", "who are you", "What are you?", "What is your name?", "Tell me about you."), _WHO),
    **dict.fromkeys(("What can you do?", "what can you do", "Help", "help!", "How can you help me?"), _HELP),
    **dict.fromkeys(("Thanks", "Thanks!", "thank you", "Thank you!", "Great, thanks."), "You are welcome."),
    **dict.fromkeys(("Bye", "bye", "Goodbye!", "See you."), "Goodbye!"),
    **dict.fromkeys(("How are you?", "how are you", "How do you do?"), "I am well, thank you. What shall I look up?"),
    **dict.fromkeys(
        (
            "What is the capital of France?",
            "Tell me a joke.",
            "What is the weather like?",
            "Write a poem about the sea.",
            "How old are you?",
            "Who won the game last night?",
            "What is the meaning of life?",
            "Translate this to German.",
            "Give me a recipe for soup.",
            "What time is it?",
        ),
        OFF_TOPIC_ANSWER,
    ),
}
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are pydoc-mini, an assistant for Python programmers.",
    "Answer in one sentence.",
    "You answer questions about Python's standard library.",
    "Be brief and precise.",
)

_SYLLABLES = [consonant + vowel for consonant in "bcdfgklmnprstvz" for vowel in "aeio"]


def phrasings_of(fact: Fact) -> tuple[str, ...]:
    """Returns every taught phrasing that suits `fact`: only functions are asked about with brackets."""
    return TAUGHT_PHRASINGS + CALL_PHRASINGS if fact.kind == "function" else TAUGHT_PHRASINGS


def held_out_phrasings(fact: Fact) -> frozenset[str]:
    """Returns the phrasings in which `fact` is never asked during training.

    A fifth of the facts, chosen by a hash of the name, have `HELD_OUT_PER_FACT` of them; the rest have none.
    """
    digest = hashlib.sha256(fact.name.encode()).digest()
    rng = random.Random(digest)
    if rng.random() >= HELD_OUT_FACT_SHARE:
        return frozenset()
    return frozenset(rng.sample(phrasings_of(fact), HELD_OUT_PER_FACT))


def made_up_names(facts: Iterable[Fact], count: int, *, seed: int) -> list[str]:
    """Returns `count` distinct names that are not taught, most of them inside real modules and classes."""
    known = {fact.name for fact in facts}
    stems = sorted({name.rpartition(".")[0] for name in known} - {""})
    leaves = sorted({name.rpartition(".")[2] for name in known})
    rng = random.Random(seed)
    names: dict[str, None] = {}
    while len(names) < count:
        word = "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 4)))
        leaf = rng.choice((word, word, rng.choice(leaves), f"{rng.choice(leaves)}_{word}"))
        stem = rng.choice((rng.choice(stems), rng.choice(stems), "".join(rng.choices(_SYLLABLES, k=3)), ""))
        name = f"{stem}.{leaf}" if stem else word
        if name not in known:
            names[name] = None
    return list(names)
