"""Base of the typed replies."""

from __future__ import annotations

import orjson
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

JsonObject = dict[str, object]  # its own name: in a model with a field called "object" the builtin is out of sight


class Reply(BaseModel):
    """A JSON reply; the same class serves it and describes it in openapi.json."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    def as_json(self) -> dict[str, object]:
        """As JSON values."""
        return self.model_dump(mode="json")

    def response(self, status_code: int = 200) -> Response:
        """As an HTTP reply."""
        return Response(orjson.dumps(self.as_json()), status_code=status_code, media_type="application/json")
