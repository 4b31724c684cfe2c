"""The caller of the request under way.

A context variable, because it is set where HTTP begins and read where a session is made, with every endpoint family in
between; tasks that a request starts inherit it.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

from services.gateway.access.rate_limits import Standing
from shared.access.api_keys import KeyRecord
from shared.errors import PermissionDenied

ANONYMOUS_TENANT = "default"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, and what came with it.

    Attributes:
        tenant: Fairness, limits and stored objects are per tenant.
        key: The record of its API key; None where no keys are asked for.
        timeout_s: The request's own deadline (`x-request-timeout-s`); 0 = none.
        added_priority: Of requests that are made on its behalf and may wait.
        standings: How it stands with its limits, by their kind, as they were counted last: what headers tell.
    """

    tenant: str = ANONYMOUS_TENANT
    key: KeyRecord | None = None
    timeout_s: float = 0.0
    added_priority: int = 0
    standings: dict[str, Standing] = field(default_factory=dict, compare=False)

    @property
    def priority(self) -> int:
        """Added to the priority of its requests."""
        return self.added_priority + (self.key.priority if self.key else 0)

    def may_use(self, model: str) -> bool:
        """Whether its key allows a model."""
        return self.key is None or not self.key.models or model in self.key.models

    def check_may_use(self, model: str) -> None:
        """Refuses a model that its key does not allow.

        Raises:
            PermissionDenied: It does not.
        """
        if not self.may_use(model):
            raise PermissionDenied(f"this API key does not allow the model {model!r}", param="model")


_caller: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039 - frozen


def current_caller() -> Caller:
    """The caller of the request that this code runs for."""
    return _caller.get()


def set_caller(caller: Caller) -> None:
    """For the rest of this context."""
    _caller.set(caller)
