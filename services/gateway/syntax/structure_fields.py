"""The fields that ask for structured output, read and held to their limits."""

from __future__ import annotations

import orjson

from services.gateway.requests.body_reader import depth_of
from services.gateway.schemas.generation import GenerationBody
from services.gateway.schemas.structure import JsonObjectFormat, JsonSchemaFormat
from services.gateway.settings import GatewaySettings
from services.gateway.syntax.grammar_text import Structure, StructureKind
from services.gateway.syntax.schema_references import endless_reference
from shared.errors import InvalidRequest


def structure_of(body: GenerationBody, settings: GatewaySettings) -> Structure | None:
    """What the output must look like; None = anything.

    Raises:
        InvalidRequest: Several such fields at once, or one beyond its limit.
    """
    found = [*_response_format(body), *_structured_outputs(body), *_guided(body)]
    if len(found) > 1:
        names = ", ".join(repr(structure.field) for structure in found)
        raise InvalidRequest(f"only one of {names} can be kept to", param=found[1].field)
    if not found:
        return None
    _check_limits(found[0], settings)
    return found[0]


def check_schema(schema: object, field: str, settings: GatewaySettings) -> None:
    """Refuses a schema that is too large or too deep, or whose values never end.

    Raises:
        InvalidRequest: It is, with both numbers; or they do not, by the reference at fault.
    """
    depth = depth_of(schema)
    if depth > settings.max_schema_depth:
        raise InvalidRequest(
            f"{field!r}: a schema {depth} levels deep, at most {settings.max_schema_depth} are served", param=field
        )
    size = len(orjson.dumps(schema))
    if size > settings.max_schema_bytes:
        raise InvalidRequest(
            f"{field!r}: a schema of {size} bytes, at most {settings.max_schema_bytes} are served", param=field
        )
    if (reference := endless_reference(schema)) is not None:
        raise InvalidRequest(
            f"{field!r} cannot be kept to: the '$ref' {reference[:100]!r} leads back to itself, so no value ever ends",
            param=field,
        )


def _response_format(body: GenerationBody) -> list[Structure]:
    wanted, field = body.response_format, "response_format"
    if isinstance(wanted, JsonObjectFormat):
        return [Structure(StructureKind.JSON, {"type": "object"}, field)]
    if isinstance(wanted, JsonSchemaFormat):
        return [Structure(StructureKind.JSON, wanted.json_schema.json_schema, field)]
    return []


def _structured_outputs(body: GenerationBody) -> list[Structure]:
    wanted = body.structured_outputs
    if wanted is None:
        return []
    white_space = "" if wanted.disable_any_whitespace else wanted.whitespace_pattern
    found = _structures(
        json_schema={"type": "object"} if wanted.json_object else wanted.json_,
        regex=wanted.regex,
        choice=wanted.choice,
        grammar=wanted.grammar,
        prefix="structured_outputs.",
        white_space=white_space,
    )
    if len(found) != 1:
        raise InvalidRequest(
            "'structured_outputs' needs exactly one of json, json_object, regex, choice and grammar",
            param="structured_outputs",
        )
    return found


def _guided(body: GenerationBody) -> list[Structure]:
    return _structures(
        json_schema=body.guided_json,
        regex=body.guided_regex,
        choice=body.guided_choice,
        grammar=body.guided_grammar,
        prefix="guided_",
        white_space=body.guided_whitespace_pattern,
    )


def _structures(
    *,
    json_schema: object,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
    prefix: str,
    white_space: str | None,
) -> list[Structure]:
    if isinstance(json_schema, str):
        try:
            json_schema = orjson.loads(json_schema)
        except orjson.JSONDecodeError as exc:
            raise InvalidRequest(f"'{prefix}json' is not valid JSON: {exc}", param=f"{prefix}json") from exc
    sources = [
        (StructureKind.JSON, json_schema, "json"),
        (StructureKind.REGEX, regex, "regex"),
        (StructureKind.CHOICE, choice, "choice"),
        (StructureKind.GRAMMAR, grammar, "grammar"),
    ]
    return [Structure(kind, source, prefix + name, white_space) for kind, source, name in sources if source is not None]


def _check_limits(structure: Structure, settings: GatewaySettings) -> None:
    source, field = structure.source, structure.field
    if structure.kind is StructureKind.JSON:
        check_schema(source, field, settings)
        return
    if structure.kind is StructureKind.CHOICE:
        assert isinstance(source, list)
        if "" in source:
            raise InvalidRequest(f"{field!r}: a choice is empty", param=field)
        size, limit, unit = sum(map(len, source)), settings.max_grammar_chars, "characters in all choices"
    elif structure.kind is StructureKind.REGEX:
        size, limit, unit = len(str(source)), settings.max_regex_chars, "characters"
    else:
        size, limit, unit = len(str(source)), settings.max_grammar_chars, "characters"
    if not 1 <= size <= limit:
        raise InvalidRequest(f"{field!r} has {size} {unit}; it must have 1 to {limit}", param=field)
