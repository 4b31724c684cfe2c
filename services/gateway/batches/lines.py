"""The lines of a batch's input, and of its results."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from services.gateway.requests.body_reader import parse_object
from shared.errors import InvalidRequest, TandemError

MAX_ERRORS = 100


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request."""

    custom_id: str
    body: bytes


def read_lines(path: Path, endpoint: str, max_lines: int) -> tuple[list[BatchLine], list[dict[str, Any]]]:
    """All requests of an input file, and what is wrong with it; blocks."""
    lines: list[BatchLine] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if len(errors) >= MAX_ERRORS or len(lines) > max_lines:
                break
            if not raw.strip():
                continue
            line, problem = _line(raw, endpoint, seen)
            if line is not None:
                lines.append(line)
                seen.add(line.custom_id)
            else:
                errors.append({"code": "invalid_request", "line": number, "message": problem, "param": None})
    if len(lines) > max_lines:
        message = f"the file has more than {max_lines} requests, the limit"
        errors.append({"code": "too_many_requests", "line": None, "message": message, "param": "input_file_id"})
    elif not lines and not errors:
        errors.append({"code": "empty_file", "line": None, "message": "the file has no requests", "param": None})
    return lines, errors


def _line(raw: bytes, endpoint: str, seen: set[str]) -> tuple[BatchLine | None, str]:
    try:
        content = parse_object(raw)
    except InvalidRequest as exc:
        return None, exc.message
    custom_id, body = content.get("custom_id"), content.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= 512:
        return None, "'custom_id' must be a text of 1 to 512 characters"
    if custom_id in seen:
        return None, f"'custom_id' {custom_id[:64]!r} occurs twice"
    if content.get("method") != "POST" or content.get("url") != endpoint:
        return None, f"'method' must be 'POST' and 'url' {endpoint!r}, as the batch says"
    if not isinstance(body, dict):
        return None, "'body' must be an object"
    if body.get("stream") or body.get("background"):
        return None, "a batch neither streams nor runs in the background"
    return BatchLine(custom_id, orjson.dumps(body)), ""


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
