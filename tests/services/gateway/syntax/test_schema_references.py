"""References of a schema: those that never end are found, those that do are not, and a schema may move."""

from __future__ import annotations

import jsonschema
import pytest

from services.gateway.syntax.schema_references import endless_reference, moved


def needs(**properties) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties)}


SELF = {"$ref": "#"}
ENDLESS = {
    "itself": (SELF, "#"),
    "a round of two": ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": SELF}}, "#/$defs/a"),
    "each alternative": ({"anyOf": [SELF, False, {"allOf": [{}, SELF]}]}, "#"),
    "a property it must have": (needs(a=SELF), "#"),
    "two in turn": (needs(b={"$ref": "#/$defs/b"}) | {"$defs": {"b": needs(a=SELF)}}, "#/$defs/b"),
    "any property": ({"type": "object", "required": ["x"], "additionalProperties": SELF}, "#"),
    "items it must have": ({"type": "array", "minItems": 1, "items": SELF}, "#"),
    "the first item": ({"type": ["array"], "minItems": 1, "prefixItems": [SELF]}, "#"),
    "both types": (needs(a=SELF) | {"type": ["object", "array"], "minItems": 1, "items": SELF}, "#"),
    "an escaped name": ({"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": SELF}}, "#/$defs/a~1b%20c"),
}
FINITE = {
    "no reference": {"type": "object", "required": ["a"]},
    "one way out": {"anyOf": [SELF, {"type": "integer"}]},
    "a property it may have": {"type": "object", "properties": {"a": SELF}},
    "items it may have": {"type": "array", "items": SELF},
    "an item that comes later": {"type": "array", "minItems": 1, "prefixItems": [{}, SELF]},
    "another type": needs(a=SELF) | {"type": ["object", "null"]},
    "no type": {"properties": {"a": SELF}, "required": ["a"]},
    "a tree": {"$ref": "#/$defs/t", "$defs": {"t": needs(left={"anyOf": [{"$ref": "#/$defs/t"}, {"type": "null"}]})}},
    "data that looks so": {"const": SELF, "default": SELF},
    "a value that is given": needs(a=SELF) | {"enum": [{}]},
    "of another document": {"$ref": "http://example.com/a"},
    "by name": {"$ref": "#node", "$anchor": "node"},
    "to nothing": {"$ref": "#/$defs/missing"},
    "no schema at all": {"type": 5, "required": [[], 1], "properties": [], "minItems": "x", "anyOf": 3, "$ref": []},
    "values of no kind": {"type": [[]], "required": ["a"], "allOf": [1, None]},
}


@pytest.mark.parametrize("name", ENDLESS)
def test_schema_of_endless_values_is_known_by_the_reference(name):
    schema, reference = ENDLESS[name]
    assert endless_reference(schema) == reference


@pytest.mark.parametrize("name", FINITE)
def test_schema_with_a_finite_value_is_not_taken_for_one_without(name):
    assert endless_reference(FINITE[name]) is None


def test_many_references_to_one_another_are_looked_at_in_no_time():
    chain = {
        f"d{i}": needs(**{f"p{j}": {"$ref": f"#/$defs/d{j}"} for j in range(max(0, i - 3), i)}) for i in range(999)
    }
    assert endless_reference({"$ref": "#/$defs/d998", "$defs": chain}) is None
    chain["d0"] = {"$ref": "#/$defs/d998"}
    assert endless_reference({"$ref": "#/$defs/d998", "$defs": chain}) == "#/$defs/d998"


def test_a_schema_that_moved_means_what_it_meant():
    schema = {
        "type": "object",
        "properties": {"next": {"anyOf": [SELF, {"type": "null"}]}, "kind": {"$ref": "#/$defs/kind"}},
        "$defs": {"kind": {"const": SELF}},
    }
    whole = {"type": "array", "items": {"$ref": "#/$defs/0"}, "$defs": {"0": moved(schema, "#/$defs/0")}}
    here, there = jsonschema.Draft202012Validator(schema), jsonschema.Draft202012Validator(whole)
    for value in ({"next": {"next": None}}, {"next": 5}, {"kind": SELF}, {"kind": {}}, {"next": {"kind": 1}}, []):
        assert here.is_valid(value) == there.is_valid([value])
