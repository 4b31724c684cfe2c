"""Settings of a service: read once from the environment in `__main__`, frozen, passed down.

Nothing else reads the environment. A prefixed variable that no field claims is refused, because a typo that is ignored
in silence costs an afternoon.
"""

from __future__ import annotations

import os
import re
from typing import Any, Self

from pydantic import SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.errors import ConfigurationError

_URL_PASSWORD = re.compile(r"(://[^:/@]*:)[^@]*@")


class ServiceSettings(BaseSettings):
    """Base of every service's settings; a subclass sets `env_prefix` in its `model_config`."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    @classmethod
    def from_environment(cls, **overrides: Any) -> Self:
        """Builds the settings from `os.environ`; keyword arguments win.

        Raises:
            ConfigurationError: An unknown variable under the prefix, or a value of the wrong type or range.
        """
        prefix = str(cls.model_config.get("env_prefix", "")).upper()
        known = {f"{prefix}{name}".upper() for name in cls.model_fields}
        unknown = sorted(name for name in os.environ if name.upper().startswith(prefix) and name.upper() not in known)
        if prefix and unknown:
            raise ConfigurationError(f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        try:
            return cls(**overrides)
        except ValidationError as exc:
            problems = "; ".join(f"{prefix}{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors())
            raise ConfigurationError(problems) from exc

    def masked(self) -> dict[str, object]:
        """All fields for the start-up log; secrets and the passwords in URLs are replaced."""
        return {name: _masked(getattr(self, name)) for name in type(self).model_fields}


def _masked(value: object) -> object:
    if isinstance(value, SecretStr):
        return "********" if value.get_secret_value() else ""
    return _URL_PASSWORD.sub(r"\1********@", value) if isinstance(value, str) else value
