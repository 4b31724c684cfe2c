"""The lines of a batch's input, and of its results."""

from __future__ import annotations

import secrets
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from services.gateway.requests.body_reader import UnknownFields, check_names, parse_object
from shared.errors import InvalidRequest, TandemError

MAX_ERRORS = 100


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request."""

    custom_id: str
    body: bytes


def read_lines(
    path: Path, endpoint: str, *, max_lines: int, max_line_bytes: int, unknown_fields: UnknownFields
) -> tuple[list[BatchLine], list[dict[str, Any]]]:
    """All requests of an input file, and what is wrong with it, by the codes that OpenAI has; blocks.

    Args:
        path: Of the file.
        endpoint: That the batch says, and so every line has to.
        max_lines: Requests that it may have.
        max_line_bytes: That one of them may have.
        unknown_fields: What to do with fields of a line that nobody knows.
    """
    lines: list[BatchLine] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, raw in enumerate(_raw_lines(file, max_line_bytes), start=1):
            if len(errors) >= MAX_ERRORS or len(lines) > max_lines:
                break
            if not raw.strip():
                continue
            try:
                if len(raw) > max_line_bytes:
                    raise _WrongLine("request_too_large", f"the line has more than {max_line_bytes} bytes, the limit")
                line = _line(raw, endpoint, seen, unknown_fields)
            except _WrongLine as exc:
                errors.append(file_error(exc.code, exc.message, line=number, param=exc.param))
            else:
                lines.append(line)
                seen.add(line.custom_id)
    if len(lines) > max_lines:
        message = f"the file has more than {max_lines} requests, the limit"
        errors.append(file_error("too_many_tasks", message, param="input_file_id"))
    elif not lines and not errors:
        errors.append(file_error("empty_file", "the file has no requests", param="input_file_id"))
    return lines, errors


class _WrongLine(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def _raw_lines(file: IO[bytes], max_bytes: int) -> Iterator[bytes]:
    """They; of one that is longer a byte more than it may have, so that no more than that is in memory."""
    while raw := file.readline(max_bytes + 1):
        rest = raw
        while len(rest) > max_bytes and not rest.endswith(b"\n"):
            rest = file.readline(max_bytes + 1)
        yield raw


def file_error(code: str, message: str, *, line: int | None = None, param: str | None = None) -> dict[str, Any]:
    """What is wrong with an input file, in OpenAI's shape."""
    return {"code": code, "line": line, "message": message, "param": param}


def _line(raw: bytes, endpoint: str, seen: Container[str], unknown_fields: UnknownFields) -> BatchLine:
    try:
        content = parse_object(raw, what="the line")
    except InvalidRequest as exc:
        raise _WrongLine("invalid_json_line", exc.message) from None
    try:
        check_names(content, ("custom_id", "method", "url", "body"), "", unknown_fields)
    except InvalidRequest as exc:
        raise _WrongLine(exc.code, exc.message, exc.param) from None
    custom_id, body = content.get("custom_id"), content.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= 512:
        raise _WrongLine("invalid_request", "'custom_id' must be a text of 1 to 512 characters", "custom_id")
    if custom_id in seen:
        raise _WrongLine("duplicate_custom_id", f"'custom_id' {custom_id[:64]!r} occurs twice", "custom_id")
    if content.get("method") != "POST":
        raise _WrongLine("invalid_method", "'method' must be 'POST'", "method")
    if content.get("url") != endpoint:
        raise _WrongLine("url_mismatch", f"'url' must be {endpoint!r}, as the batch says", "url")
    if not isinstance(body, dict):
        raise _WrongLine("invalid_request", "'body' must be an object", "body")
    for field in ("stream", "background"):
        if body.get(field):
            raise _WrongLine("invalid_request", "a batch neither streams nor runs in the background", f"body.{field}")
    return BatchLine(custom_id, orjson.dumps(body))


def success_line(custom_id: str, reply: bytes) -> bytes:
    """A result."""
    return _result(custom_id, {"status_code": 200, "body": orjson.Fragment(reply)}, None)


def error_line(custom_id: str, error: TandemError) -> bytes:
    """A request that was refused or failed."""
    body = {"error": {"message": error.message, "type": error.openai_type, "param": error.param, "code": error.code}}
    return _result(custom_id, {"status_code": error.http_status, "body": body}, None)


def unmade_line(custom_id: str, code: str, message: str) -> bytes:
    """A request that was never made."""
    return _result(custom_id, None, {"code": code, "message": message})


def _result(custom_id: str, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    request_id = f"batch_req_{secrets.token_hex(12)}"
    if response is not None:
        response = {"request_id": request_id, **response}
    result = {"id": request_id, "custom_id": custom_id, "response": response, "error": error}
    return orjson.dumps(result) + b"\n"


class ResultFile:
    """Results in the order in which they come, one line each. What a crash left of a line is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: set[str] = set()
        if path.exists():
            raw = path.read_bytes()
            whole = raw[: raw.rfind(b"\n") + 1]
            if len(whole) != len(raw):
                path.write_bytes(whole)
            self.done = {orjson.loads(line)["custom_id"] for line in whole.splitlines()}
        self._file = path.open("ab")

    def add(self, custom_id: str, line: bytes) -> None:
        """Appends a line; on disk when this returns, as far as a crash of the process goes."""
        self._file.write(line)
        self._file.flush()
        self.done.add(custom_id)

    def close(self) -> None:
        """Closes it; an empty one is removed."""
        self._file.close()
        if not self.done:
            self.path.unlink(missing_ok=True)
