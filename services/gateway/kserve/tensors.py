"""Tensors of the Open Inference Protocol: named, typed, flat. Text is BYTES: each element with its length before it."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from shared.errors import InvalidRequest

Element = bytes | bool | int | float

_FORMATS = {"BOOL": "?", "INT32": "i", "INT64": "q", "UINT32": "I", "UINT64": "Q", "FP32": "f", "FP64": "d"}
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Tensor:
    """`elements` in row-major order."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    elements: tuple[Element, ...]

    def packed(self) -> bytes:
        """As raw little-endian bytes."""
        if self.datatype == "BYTES":
            return b"".join(_LENGTH.pack(len(e)) + e for e in self.elements if isinstance(e, bytes))
        return struct.pack(f"<{len(self.elements)}{_FORMATS[self.datatype]}", *self.elements)


def column(name: str, datatype: str, elements: Sequence[Element]) -> Tensor:
    """A tensor of one dimension."""
    return Tensor(name, datatype, (len(elements),), tuple(elements))


def tensor_from(name: str, datatype: str, shape: Sequence[int], elements: Sequence[object]) -> Tensor:
    """A tensor whose elements came one by one; text becomes bytes.

    Raises:
        InvalidRequest: The number of elements does not fit the shape, or one has the wrong type.
    """
    _check_datatype(name, datatype)
    if any(size < 0 for size in shape) or math.prod(shape) != len(elements):
        raise InvalidRequest(f"input {name!r}: shape {list(shape)} does not hold {len(elements)} elements", param=name)
    checked = tuple(_element(name, datatype, element) for element in elements)
    return Tensor(name, datatype, tuple(shape), checked)


def tensor_from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Tensor:
    """A tensor from raw bytes.

    Raises:
        InvalidRequest: The bytes do not fit the datatype and the shape.
    """
    _check_datatype(name, datatype)
    if datatype == "BYTES":
        return tensor_from(name, datatype, shape, _split(name, raw))
    layout = struct.Struct(f"<{_FORMATS[datatype]}")
    if len(raw) % layout.size:
        raise InvalidRequest(f"input {name!r}: {len(raw)} bytes are no whole number of {datatype}", param=name)
    return tensor_from(name, datatype, shape, [element for (element,) in layout.iter_unpack(raw)])


def _check_datatype(name: str, datatype: str) -> None:
    if datatype != "BYTES" and datatype not in _FORMATS:
        known = ", ".join(["BYTES", *_FORMATS])
        raise InvalidRequest(f"input {name!r}: datatype {datatype!r} is not one of {known}"[:300], param=name)


def _element(name: str, datatype: str, element: object) -> Element:
    if datatype == "BYTES" and isinstance(element, str):
        return element.encode()
    wanted = {"BYTES": bytes, "BOOL": bool, "FP32": int | float, "FP64": int | float}.get(datatype, int)
    if not isinstance(element, wanted) or (isinstance(element, bool) and datatype != "BOOL"):
        raise InvalidRequest(f"input {name!r}: an element is no {datatype}", param=name)
    assert isinstance(element, bytes | bool | int | float)
    return element


def _split(name: str, raw: bytes) -> list[bytes]:
    elements: list[bytes] = []
    position = 0
    while position < len(raw):
        begin = position + _LENGTH.size
        if begin > len(raw):
            raise InvalidRequest(f"input {name!r}: the bytes end inside a length", param=name)
        (length,) = _LENGTH.unpack_from(raw, position)
        position = begin + length
        if position > len(raw):
            raise InvalidRequest(f"input {name!r}: the bytes end inside an element", param=name)
        elements.append(raw[begin:position])
    return elements
