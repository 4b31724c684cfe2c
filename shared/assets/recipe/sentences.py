"""Picks the one sentence of a docstring that `pydoc-mini` is taught as its answer."""

import re
from collections.abc import Iterator

MIN_CHARS = 14
MAX_CHARS = 190
MIN_WORDS = 2

_CALL = r"[\w.]+\s*\([^()]*(?:\([^()]*\)[^()]*)*\)"
_SIGNATURE_LINE = re.compile(rf"^(?:{_CALL}|class \w+)\s*(?::$|(?:-+>|=>|=)\s*[^.]*\.?$|$)")
_SIGNATURE_PREFIX = re.compile(rf"^{_CALL}\s*(?:-+>\s*(?:[\w\[\], ]+?|\([\w, ]+\))\s*)?(?:--?|:|\.)\s+(?=\w)")
_ARROW = re.compile(rf"^{_CALL}\s*-+>\s*(?=\w+,? \w+)")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]?\s+(?=[A-Za-z`'\"(*:])")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|eg|i\.e|ie|a\.k\.a|etc|vs|cf|No|Mr|St|approx|esp|resp)\.|\.\.\.)$")
# A paragraph that starts so goes into details: the summary stood in the signature line before it.
_DETAIL = re.compile(r"(?:If|Raises?|Otherwise) ")
_URL = re.compile(r"\s*<https?://[^>]*>")
_JUNK = re.compile(
    r"^(?:see |todo|xxx|deprecated|internal|private|note|usage|undocumented|the same as|self\b|[\w.]+: |\w+ \| |\w+=)"
    r"|[{}|<>=\\]{2,}|->| = |\\\.$|>>>|@|https?:|--help|\(ear\)|\.\.\.$|automatically generated",
    re.IGNORECASE,
)


def first_sentence(doc: str) -> str | None:
    """Returns the first sentence of `doc`, or None where it has none worth teaching.

    The words stay the docstring's own; only white space is normalised, call signatures and bracketed links are left
    out, the first letter is made upper case and a missing full stop is added.
    """
    text = next(_prose_paragraphs(doc), "")
    if not text or _DETAIL.match(text):
        text = _returned(doc, min_words=4 if text else 3) or text
    for match in _SENTENCE_END.finditer(text):
        if not _ABBREVIATION.search(text[: match.start()]):
            text = text[: match.start()]
            break
    if not MIN_CHARS <= len(text) <= MAX_CHARS or not text.isascii() or not text.isprintable():
        return None
    if text[-1] in ":;,-(" or _JUNK.search(text) or not _is_balanced(text) or len(text.split()) < MIN_WORDS:
        return None
    if text[0].islower() and text.split()[0].rstrip(",").isalpha():
        text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?" else text + "."


def _prose_paragraphs(doc: str) -> Iterator[str]:
    """Yields the paragraphs of `doc`, each on one line, without call signatures and without scraps."""
    for paragraph in re.split(r"\n\s*\n", doc.expandtabs().strip()):
        lines = [line.strip() for line in paragraph.splitlines()]
        while lines and _SIGNATURE_LINE.match(lines[0]) and not _continues(lines):
            lines.pop(0)
        text = _URL.sub("", re.sub(r"\s+", " ", " ".join(lines)).strip())
        text = _ARROW.sub("", _SIGNATURE_PREFIX.sub("", text)).strip()
        if (len(text) >= MIN_CHARS and text[0].isalpha()) or text.startswith(("`", "'", '"', "*")):
            yield text


def _continues(lines: list[str]) -> bool:
    """Says whether the second line goes on with a sentence that the signature on the first line began."""
    return len(lines) > 1 and lines[1][:1].islower() and not _SIGNATURE_LINE.match(lines[1])


def _returned(doc: str, *, min_words: int) -> str | None:
    """Returns the words after the arrow of a first line such as `D.keys() -> a set-like object ...`."""
    words, arrows = _ARROW.subn("", doc.strip().partition("\n")[0].strip())
    return words if arrows and len(words.split()) >= min_words else None


def _is_balanced(text: str) -> bool:
    """Says whether brackets and back quotes pair up, which a cut-off sentence seldom manages."""
    return text.count("(") == text.count(")") and text.count("[") == text.count("]") and text.count("`") % 2 == 0
