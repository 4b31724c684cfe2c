"""JSON objects that clients send, and the fields of them that are refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field that clients know and Tandem does not serve.

    Attributes:
        reason: Completes "'field' is not supported: ...".
        neutral: Values that ask for nothing and are therefore accepted, besides null.
    """

    reason: str
    neutral: tuple[object, ...] = ()


def _tell_refused(schema: dict[str, Any], model: type[Body]) -> None:
    """Adds fields that are known and refused, with the values that ask for nothing and why others are refused."""
    for name, refusal in model.refused.items():
        schema["properties"][name] = {
            "enum": [None, *refusal.neutral],
            "description": f"Refused: {refusal.reason}.",
        }
    schema["x-closed"] = True


class Body(BaseModel):
    """A JSON object that a client sends, or one inside of it.

    What no field claims is kept, so that it can be refused with its reason.
    """

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=(), json_schema_extra=_tell_refused
    )

    refused: ClassVar[dict[str, Refusal]] = {}
