"""References of a JSON schema: renamed where a schema becomes part of another one, and found out where they never end.

`{"$ref": "#"}` is a schema of no value, and `{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}`
one of endless values only. Compilers take both; whoever generates by them never comes to an end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeGuard
from urllib.parse import unquote

_DATA = frozenset({"const", "enum", "default", "examples"})
"""Keywords whose values are no schemas, whatever they look like."""
_NEVER = ""
"""In the place of a reference that would have to become finite: nothing would help."""


def moved(node: object, place: str) -> object:
    """A copy of a schema with its references to itself renamed, for where it is found at `place` of another one.

    Args:
        node: A schema, or a part of one.
        place: A pointer like `#/$defs/a`.
    """
    if isinstance(node, dict):
        return {
            key: place + value[1:]
            if key == "$ref" and _is_inner(value)
            else value
            if key in _DATA
            else moved(value, place)
            for key, value in node.items()
        }
    return [moved(item, place) for item in node] if isinstance(node, list) else node


def endless_reference(schema: object) -> str | None:
    """A reference that keeps every value of a schema from ending; None if some value is finite.

    What has no value for other reasons counts as finite: the compiler refuses that itself. Linear in the schema's
    size times the number of references in one part of it.
    """
    targets = {"#": schema, **{ref: _target(schema, ref) for ref in _references(schema)}}
    finite: set[str] = set()
    waiting: dict[str, list[str]] = {}
    pending = list(targets)
    while pending:
        place = pending.pop()
        if place in finite:
            continue
        if blockers := _blockers(targets[place], finite):
            for blocker in blockers:
                waiting.setdefault(blocker, []).append(place)
        else:
            finite.add(place)
            pending += waiting.pop(place, [])
    return None if "#" in finite else next(iter(_blockers(schema, finite) - {_NEVER}), None)


def _is_inner(reference: object) -> TypeGuard[str]:
    """A pointer into the schema itself, not a name nor another document's."""
    return isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))


def _references(node: object) -> Iterator[str]:
    """Those within the schema."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref" and _is_inner(value):
                yield value
            elif key not in _DATA:
                yield from _references(value)
    elif isinstance(node, list):
        for item in node:
            yield from _references(item)


def _target(schema: object, reference: str) -> object:
    """What a reference points to; of one to nothing, a schema of all values."""
    node = schema
    for part in unquote(reference).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and name in node:
            node = node[name]
        elif isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        else:
            return True
    return node


def _blockers(node: object, finite: set[str]) -> set[str]:
    """References of which one has to be finite before the schema can be; none if it is."""
    if not isinstance(node, Mapping):
        return {_NEVER} if node is False else set()
    reference = node.get("$ref")
    if _is_inner(reference) and reference not in finite:
        return {reference}
    for part in _list(node, "allOf"):
        if blockers := _blockers(part, finite):
            return blockers
    for keyword in ("anyOf", "oneOf"):
        if (parts := _list(node, keyword)) and (blockers := _of_any(parts, finite)):
            return blockers
    if "const" in node or "enum" in node:
        return set()
    wanted = node.get("type")
    types = [wanted] if isinstance(wanted, str) else _list(node, "type")
    if not types or any(kind not in ("object", "array") for kind in types):
        return set()
    inner = [(_of_object if kind == "object" else _of_array)(node, finite) for kind in types]
    return set().union(*inner) if all(inner) else set()


def _of_any(parts: list[object], finite: set[str]) -> set[str]:
    found: set[str] = set()
    for part in parts:
        blockers = _blockers(part, finite)
        if not blockers:
            return set()
        found |= blockers
    return found


def _of_object(node: Mapping[str, object], finite: set[str]) -> set[str]:
    properties = node.get("properties")
    if not isinstance(properties, Mapping):
        properties = {}
    others = None if "patternProperties" in node else node.get("additionalProperties")
    for name in _list(node, "required"):
        if isinstance(name, str) and (blockers := _blockers(properties.get(name, others), finite)):
            return blockers
    return set()


def _of_array(node: Mapping[str, object], finite: set[str]) -> set[str]:
    least, first = node.get("minItems", 0), _list(node, "prefixItems")
    if not isinstance(least, int | float):
        return set()
    inner = first[: int(least)] if least <= len(first) else [*first, node.get("items")]
    for part in inner:
        if blockers := _blockers(part, finite):
            return blockers
    return set()


def _list(node: Mapping[str, object], keyword: str) -> list[object]:
    found = node.get(keyword)
    return found if isinstance(found, list) else []
