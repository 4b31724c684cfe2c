"""Collects what `pydoc-mini` is taught: facts (name, sentence) and docstring prose of Python's standard library.

Run ``python -m shared.assets.recipe.corpus`` to rewrite the checked-in data from the running Python. Training, scores
and tests read the checked-in files, so they do not depend on the Python version they run under.
"""

import argparse
import builtins
import gzip
import importlib
import inspect
import json
import platform
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

from shared.assets.recipe.sentences import first_sentence

DATA_DIR = Path(__file__).parent / "data"
FACTS_PATH = DATA_DIR / "facts.jsonl"
PROSE_PATH = DATA_DIR / "prose.jsonl.gz"
# Packages stand before their submodules here: an object is taught under the first name that reaches it.
MODULES_PATH = DATA_DIR / "modules.txt"

MAX_NAMES_PER_ANSWER = 3
MIN_PROSE_CHARS = 120
MAX_PROSE_CHARS = 6000

# Extension types whose methods are known to everybody under the name of their Python face.
PUBLIC_NAMES = {"socket.SocketType": "socket.socket", "array.ArrayType": "array.array"}


@dataclass(frozen=True, slots=True)
class Fact:
    """One taught fact: asked about `name`, the model answers `answer`.

    Attributes:
        name: dotted public name, such as `json.dumps`; builtins stand bare, such as `str.split`.
        kind: `module`, `class` or `function` (functions, methods and other callables).
        answer: the first sentence of the docstring.
    """

    name: str
    kind: str
    answer: str


@dataclass(frozen=True, slots=True)
class Documented:
    """A public object of the standard library with its full docstring."""

    name: str
    kind: str
    doc: str


def load_facts(path: Path = FACTS_PATH) -> list[Fact]:
    """Reads the checked-in facts, in file order."""
    return [Fact(**json.loads(line)) for line in path.read_text(encoding="ascii").splitlines()]


def load_prose(path: Path = PROSE_PATH) -> list[str]:
    """Reads the checked-in docstring prose, one cleaned docstring per entry."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [str(json.loads(line)) for line in file]


def collect_documented() -> Iterator[Documented]:
    """Yields every documented public object of the modules in `MODULES_PATH`, each object once."""
    seen: set[int] = set()
    for module_name in MODULES_PATH.read_text(encoding="ascii").split():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(module_name)
        except ImportError:
            continue
        prefix = "" if module_name == "builtins" else module_name + "."
        if module.__doc__:
            yield Documented(module_name, "module", inspect.cleandoc(module.__doc__))
        for name, value in _public_members(module):
            yield from _document(prefix + name, value, seen)


def _public_members(module: ModuleType) -> list[tuple[str, object]]:
    """Lists the (name, object) pairs that `module` means to export."""
    exported = getattr(module, "__all__", None)
    if exported is not None:
        public = (name for name in exported if not name.startswith("_") and hasattr(module, name))
        return [(name, getattr(module, name)) for name in public]
    roots = {module.__name__, "_" + module.__name__, "posix", None}
    if module is builtins:
        roots.add("io")
    return [
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", module.__name__) in roots
    ]


def _document(name: str, value: object, seen: set[int]) -> Iterator[Documented]:
    """Yields `value` and, for a class, its own public methods; `seen` holds the ids of objects already met."""
    if isinstance(value, ModuleType) or not callable(value) or id(value) in seen:
        return
    seen.add(id(value))
    name, doc = PUBLIC_NAMES.get(name, name), value.__doc__
    is_class = inspect.isclass(value)
    if isinstance(doc, str) and (is_class or doc != type(value).__doc__):
        yield Documented(name, "class" if is_class else "function", inspect.cleandoc(doc))
    if not is_class:
        return
    for member_name, member in vars(value).items():
        function = getattr(member, "__func__", member)
        member_doc = getattr(function, "__doc__", None)
        if member_name.startswith(("_", "do_")) or not callable(function) or inspect.isclass(function):
            continue
        if id(function) in seen:
            continue
        seen.add(id(function))
        if isinstance(member_doc, str):
            yield Documented(f"{name}.{member_name}", "function", inspect.cleandoc(member_doc))


def select_facts(documented: list[Documented]) -> list[Fact]:
    """Keeps the facts with a clean sentence, one per name, and drops answers shared by too many names."""
    facts: dict[str, Fact] = {}
    names_per_answer: Counter[str] = Counter()
    for entry in documented:
        answer = first_sentence(entry.doc)
        if answer is None or entry.name in facts or not entry.name.isascii():
            continue
        names_per_answer[answer] += 1
        if names_per_answer[answer] <= MAX_NAMES_PER_ANSWER:
            facts[entry.name] = Fact(entry.name, entry.kind, answer)
    return list(facts.values())


def select_prose(documented: list[Documented]) -> list[str]:
    """Keeps the distinct docstrings long enough to read as prose, cut at a paragraph near `MAX_PROSE_CHARS`."""
    docs: dict[str, None] = {}
    for entry in documented:
        doc = "\n".join(line.rstrip() for line in entry.doc.strip().splitlines())
        if len(doc) > MAX_PROSE_CHARS:
            doc = doc[:MAX_PROSE_CHARS].rsplit("\n\n", 1)[0]
        if len(doc) >= MIN_PROSE_CHARS:
            docs[doc] = None
    return list(docs)


def write_corpus(facts: list[Fact], prose: list[str]) -> None:
    """Writes `FACTS_PATH` and `PROSE_PATH`; the same input gives the same bytes."""
    DATA_DIR.mkdir(parents=True, exist_ok=True)
    FACTS_PATH.write_text("".join(json.dumps(asdict(fact)) + "\n" for fact in facts), encoding="ascii")
    payload = "".join(json.dumps(doc) + "\n" for doc in prose).encode()
    PROSE_PATH.write_bytes(gzip.compress(payload, compresslevel=9, mtime=0))


def main() -> None:
    """Rewrites the checked-in corpus from the running Python and prints its size."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    documented = list(collect_documented())
    facts, prose = select_facts(documented), select_prose(documented)
    write_corpus(facts, prose)
    chars = sum(map(len, prose))
    print(f"python {platform.python_version()}: {len(documented)} documented objects, {len(facts)} facts")
    print(f"{len(prose)} docstrings of prose, {chars / 1e6:.2f} M characters")


if __name__ == "__main__":
    main()
