"""Logging of the command line itself: what it has to say it prints; what libraries say is for the services' logs."""

from __future__ import annotations

from shared.log import configure_logging


def quiet_libraries() -> None:
    """Lets only errors through."""
    configure_logging("tandem", "error")
