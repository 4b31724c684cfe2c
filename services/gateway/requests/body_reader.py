"""Raw bytes to a typed body, with errors that name the field."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, TypeVar

import orjson
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect, Request

from services.gateway.schemas.body import Body
from services.gateway.schemas.tools import UNSUPPORTED
from shared.errors import Cancelled, InvalidRequest, RequestTooLarge, UnsupportedField

UnknownFields = Literal["refuse", "ignore"]
B = TypeVar("B", bound=Body)

MAX_MESSAGE_CHARS = 500
MAX_DEPTH = 200
"""Of lists and objects in one another: what is read here is written elsewhere, and writers go no deeper than 254."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        InvalidRequest: It is compressed.
        RequestTooLarge: Announced or actual size is above the limit; nothing more is read then.
        Cancelled: The client left before it was sent.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() in ("", "identity"):  # compressed on the way, or as it is
        encoding = request.headers.get("transfer-encoding", "chunked").lower().replace("chunked", "").strip(", \t")
    if encoding.lower() not in ("", "identity"):
        raise InvalidRequest(f"a request body in {encoding[:32]!r} is not read: send it uncompressed")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise RequestTooLarge(f"the request body has {announced} bytes, at most {max_bytes} are read")
    pieces: list[bytes] = []
    size = 0
    try:
        async for piece in request.stream():
            pieces.append(piece)
            size += len(piece)
            if size > max_bytes:
                raise RequestTooLarge(f"the request body has more than {size - 1} bytes, at most {max_bytes} are read")
    except ClientDisconnect as exc:
        raise Cancelled("the client left while it sent the request") from exc
    return b"".join(pieces)


def parse_body(raw: bytes, schema: type[B], unknown_fields: UnknownFields) -> B:
    """Checks the fields one by one: types and ranges, then names.

    Raises:
        InvalidRequest: Not JSON, not an object, a wrong type or range, or a field that nobody knows.
        UnsupportedField: A field that is known and not served.
    """
    return validate(parse_object(raw), schema, unknown_fields)


def parse_object(raw: bytes, *, what: str = "the request body") -> dict[str, object]:
    """The body as a JSON object.

    Args:
        raw: The body.
        what: It is, for errors.

    Raises:
        InvalidRequest: Not JSON, not an object, or too deep.
    """
    try:
        content = orjson.loads(raw)
    except orjson.JSONDecodeError as exc:
        raise InvalidRequest(f"{what} is not valid JSON: {exc}") from exc
    if not isinstance(content, dict):
        raise InvalidRequest(f"{what} must be a JSON object")
    if _may_be_deep(raw) and (depth := depth_of(content)) > MAX_DEPTH:
        raise InvalidRequest(f"{what} is {depth} levels deep, at most {MAX_DEPTH} are read")
    return content


def _may_be_deep(raw: bytes) -> bool:
    """Whether so many lists and objects begin in it; what has few is looked through at the speed of memory."""
    num_begun = 0
    for mark in (b"[", b"{"):
        at = raw.find(mark)
        while at >= 0 and num_begun <= MAX_DEPTH:
            num_begun += 1
            at = raw.find(mark, at + 1)
    return num_begun > MAX_DEPTH


def depth_of(content: object) -> int:
    """How many lists and objects are in one another."""
    deepest, level = 0, [content]
    while level := [node for node in level if isinstance(node, dict | list)]:
        deepest += 1
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
    return deepest


def validate(content: dict[str, object], schema: type[B], unknown_fields: UnknownFields) -> B:
    """A JSON object as a typed body.

    Raises:
        InvalidRequest: A wrong type or range, or a field that nobody knows.
        UnsupportedField: A field that is known and not served.
    """
    try:
        body = schema.model_validate(content)
    except ValidationError as exc:
        raise _invalid(exc, content) from exc
    check_extra(body, unknown_fields)
    return body


def check_extra(body: Body, unknown_fields: UnknownFields, *, where: str = "") -> None:
    """Refuses what the schemas of a body and of the objects inside of it do not have, by its reason if there is one.

    Args:
        body: Validated; what is ignored is no part of it afterwards.
        unknown_fields: What to do with fields that nobody knows.
        where: Path of the object inside the body, with its trailing dot.

    Raises:
        UnsupportedField: Known and refused, with a value that asks for something.
        InvalidRequest: Unknown, and unknown fields are not to be ignored.
    """
    if body.model_extra:
        for name, value in body.model_extra.items():
            _check_unclaimed(type(body), name, value, unknown_fields, where)
        body.model_extra.clear()
    for name, value in body.__dict__.items():
        if value is None:  # as most are
            continue
        if isinstance(value, Body):
            check_extra(value, unknown_fields, where=f"{where}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Body):
            for i, part in enumerate(value):
                check_extra(part, unknown_fields, where=f"{where}{name}[{i}].")


def check_names(part: Mapping[str, object], known: Collection[str], where: str, unknown_fields: UnknownFields) -> None:
    """Refuses what an object that no schema describes has beside its known fields, unless that is ignored.

    Raises:
        InvalidRequest: It has such a field.
    """
    if unknown_fields == "refuse" and (extra := next((name for name in part if name not in known), None)) is not None:
        path = f"{where}.{extra[:64]}" if where else extra[:64]
        raise InvalidRequest(f"unknown field {path!r}", param=path)


def _check_unclaimed(schema: type[Body], name: str, value: object, unknown_fields: UnknownFields, where: str) -> None:
    path = f"{where}{name}"
    if (refusal := schema.refused.get(name)) is not None:
        if value is not None and value not in refusal.neutral:
            raise UnsupportedField(f"{path!r} is not supported: {refusal.reason}", param=path)
    elif unknown_fields == "refuse":
        close = difflib.get_close_matches(name[:64], [*schema.model_fields, *schema.refused], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InvalidRequest(f"unknown field {path!r}"[:MAX_MESSAGE_CHARS] + hint, param=path)


def _invalid(exc: ValidationError, content: object) -> InvalidRequest:
    """The first field's problem, in words. A union tells one per branch: the branch that got farthest was meant."""
    problems: list[ErrorDetails] = exc.errors(include_url=False, include_input=False)
    problem = max((p for p in problems if p["loc"][0] == problems[0]["loc"][0]), key=lambda p: len(p["loc"]))
    is_missing = problem["type"] == "missing"
    path = _path(problem["loc"], content, ends_in_name=is_missing)
    if is_missing:
        return InvalidRequest(f"the field {path!r} is required", param=path)
    if problem["type"] == UNSUPPORTED:
        return UnsupportedField(f"{path!r} is not supported: {problem['msg']}", param=path)
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return InvalidRequest(f"{path!r}: {message}"[:MAX_MESSAGE_CHARS], param=path)


def _path(location: Sequence[int | str], content: object, *, ends_in_name: bool) -> str:
    """`messages[0].role`; without the names that pydantic gives the branches of a union, which `content` has not.

    Args:
        location: Pydantic's.
        content: What was validated.
        ends_in_name: The last one is a field's though `content` has it not.
    """
    text, last = "", len(location) - 1
    for position, part in enumerate(location):
        if isinstance(part, int):
            text += f"[{part}]"
            content = content[part] if isinstance(content, list) and part < len(content) else None
        elif isinstance(content, dict) and (part in content or (ends_in_name and position == last)):
            text += f".{part}" if text else part
            content = content.get(part)
    return text
