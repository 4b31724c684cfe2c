"""Varies the wording of questions as people do: greetings, quotes, case, stray punctuation, a closing request.

Only scoring asks so: it tells how far the model, trained on plain phrasings, can be pushed.
"""

import random

FREE_PHRASINGS = (
    "Could you explain {name}?",
    "Would you describe {name} for me?",
    "What's the use of {name}?",
    "What is the use of {name}?",
    "When would I use {name}?",
    "Why would I use {name}?",
    "Give me a summary of {name}.",
    "Summarize {name}.",
    "Define {name}.",
    "Look up {name}.",
    "docs for {name}",
    "documentation of {name}",
    "help {name}",
    "pydoc {name}",
    "Show me the docstring of {name}.",
    "What does the docstring of {name} say?",
    "What does the standard library's {name} do?",
    "What does Python's {name} do?",
    "What exactly does {name} do?",
    "What is {name} good for?",
    "What is {name} used for?",
    "What is meant by {name}?",
    "What happens in {name}?",
    "How does {name} work?",
    "Do you know {name}?",
    "Do you know what {name} does?",
    "Can you tell me about {name}?",
    "Can you say what {name} does?",
    "I do not understand {name}.",
    "I found {name} in some code. What is it?",
    "My code calls {name}. What does it do?",
    "{name}: what does it do?",
    "{name}, what is that?",
    "And {name}?",
    "What about {name}?",
    "Let us talk about {name}.",
)

_OPENINGS = (
    "Hi! ",
    "Hello! ",
    "Hello, ",
    "Hey, ",
    "OK, ",
    "So, ",
    "Now, ",
    "Thanks! ",
    "Quick question: ",
    "Question: ",
)
_CLOSINGS = (
    " Thanks!",
    " Thank you.",
    " Please.",
    " Answer in one sentence.",
    " Be brief.",
    " Keep it short.",
    " In short.",
)
_ENDINGS = ("", "?", "?", ".", "!", "??", " ?", "?!", "...")
_QUOTES = ("{}", "{}", "{}", "`{}`", "'{}'", '"{}"', "**{}**", "{}()")


def vary(phrasing: str, name: str, rng: random.Random) -> str:
    """Fills `name` into `phrasing`, with none, some or all of the variations that `rng` draws."""
    text = phrasing.replace("`", "").replace("()", "")
    if rng.random() < 0.5:
        text = text.rstrip("?.!") + rng.choice(_ENDINGS)
    text = _in_other_case(text, rng)
    text = text.replace("{name}", rng.choice(_QUOTES).format(name))
    if rng.random() < 0.25:
        text = rng.choice(_OPENINGS) + text
    if rng.random() < 0.25:
        text = text + rng.choice(_CLOSINGS)
    return f" {text}\n"[rng.choice((0, 1, 1, 1)) : rng.choice((None, -1, -1, -1))]


def _in_other_case(text: str, rng: random.Random) -> str:
    """Changes the case of the words around the name, which itself keeps its case."""
    luck = rng.random()
    if luck < 0.3:
        return text.lower()
    if luck < 0.35:
        return text.upper().replace("{NAME}", "{name}")
    if luck < 0.4:
        return text.title().replace("{Name}", "{name}")
    return text
