"""The optional `timing` block: what the gateway stamped, what it predicted, and what the worker reported."""

from __future__ import annotations

import dataclasses

from services.gateway.sessions.generation import Generation, Stamps
from services.gateway.sessions.session import Session


def timing_block(generation: Generation) -> dict[str, object]:
    """All durations in seconds: of the request since it was received, of a session since its worker received it."""
    stamps = generation.stamps
    return {
        "tokenized_s": _since(stamps, stamps.tokenized_s),
        "placed_s": _since(stamps, stamps.placed_s),
        "first_token_s": _since(stamps, stamps.first_token_s),
        "last_token_s": _since(stamps, stamps.last_token_s),
        "sessions": [_session_block(session) for session in generation.sessions],
    }


def _session_block(session: Session) -> dict[str, object]:
    placement, finish = session.placement, session.finish
    assert placement is not None
    reported: dict[str, object] = dataclasses.asdict(finish.timeline) if finish else {}
    return {
        "session_id": session.session_id,
        "attempts": session.attempts,
        "migrations": session.losses[: session.attempts - 1],
        "decode_worker": placement.decode.worker_id,
        **reported,
        "predicted": {
            "mode": placement.mode.value,
            "first_token_s": round(placement.predicted_s, 6),
            "local_cost_s": round(placement.local_s, 6),
            "remote_cost_s": None if placement.remote_s is None else round(placement.remote_s, 6),
            "is_measured": placement.is_measured,
        },
    }


def _since(stamps: Stamps, at_s: float) -> float | None:
    return round(at_s - stamps.received_s, 6) if at_s else None
