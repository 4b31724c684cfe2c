"""The gateway's Prometheus metrics: every name is declared here. vLLM's names where the meaning is vLLM's."""

from __future__ import annotations

from functools import cache

from prometheus_client import Counter, Gauge, Histogram

from services.gateway.sessions.placement import Placement
from services.gateway.sessions.session import Session
from shared.metrics.registry import exposition, new_registry
from shared.metrics.tally import Tally

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640)


class RequestMetrics:
    """One registry per gateway."""

    def __init__(self, model: str) -> None:
        self._registry = registry = new_registry()
        self._model = model
        label = ("model_name",)
        self.running = Gauge(
            "tandem_gateway_requests_running",
            "Requests under way at this gateway",
            label,
            registry=registry,
            multiprocess_mode="livesum",
        ).labels(model)
        self.prompt_tokens = Counter(
            "vllm:prompt_tokens", "Prompt tokens of finished requests", label, registry=registry
        ).labels(model)
        self.generation_tokens = Counter("vllm:generation_tokens", "Tokens generated", label, registry=registry).labels(
            model
        )
        self.cached_tokens = Counter(
            "vllm:prompt_tokens_cached",
            "Prompt tokens of finished requests whose KV was reused",
            label,
            registry=registry,
        ).labels(model)
        self.first_token_s = Histogram(
            "vllm:time_to_first_token_seconds",
            "From the request's last byte to its first token",
            label,
            buckets=_LATENCY_S,
            registry=registry,
        ).labels(model)
        self.token_gap_s = Tally(
            Histogram(
                "vllm:inter_token_latency_seconds",
                "Between tokens of a choice, as they arrive at the gateway",
                label,
                buckets=_LATENCY_S,
                registry=registry,
            ).labels(model),
            _LATENCY_S,
        )
        self.request_s = Histogram(
            "vllm:e2e_request_latency_seconds",
            "From the request's last byte to the end of its reply",
            label,
            buckets=_REQUEST_S,
            registry=registry,
        ).labels(model)
        # The library finds the one of some labels by locks and strings; what every request asks for is remembered.
        self._success = cache(
            Counter(
                "vllm:request_success", "Choices that ended", ("model_name", "finished_reason"), registry=registry
            ).labels
        )
        self._failures = Counter("tandem_request_failures", "Requests that failed", ("code",), registry=registry)
        self._placements = cache(
            Counter(
                "tandem_placements", "Sessions by how their KV was expected to come to be", ("mode",), registry=registry
            ).labels
        )
        self._modes = cache(
            Counter(
                "tandem_session_modes", "Finished sessions by how their KV came to be", ("mode",), registry=registry
            ).labels
        )
        self._migrations = Counter(
            "tandem_migrations",
            "Sessions that went on at another worker, by what made the one before give up",
            ("cause",),
            registry=registry,
        )
        self._predicted_s, self._actual_s = (
            cache(Histogram(name, what, ("mode",), buckets=_LATENCY_S, registry=registry).labels)
            for name, what in (
                ("tandem_predicted_first_token_seconds", "From submission to the first token, as placement predicted"),
                ("tandem_actual_first_token_seconds", "From submission to the first token, as it was"),
            )
        )

    def choice_ended(self, finish_reason: str) -> None:
        """A choice ended as the client asked, or was aborted because the client left."""
        self._success(self._model, finish_reason).inc()

    def request_failed(self, code: str) -> None:
        """A request was answered with an error."""
        self._failures.labels(code).inc()

    def session_placed(self, placement: Placement) -> None:
        """A session was submitted."""
        self._placements(placement.mode.value).inc()
        self._predicted_s(placement.mode.value).observe(placement.predicted_s)

    def session_started(self, session: Session) -> None:
        """A session's first token came."""
        assert session.placement is not None
        self._actual_s(session.placement.mode.value).observe(session.first_token_s - session.submitted_s)

    def session_migrated(self, cause: str) -> None:
        """A session went on at another worker; `cause` is the code of the error before."""
        self._migrations.labels(cause).inc()

    def session_finished(self, mode: str) -> None:
        """A worker reported how a session's KV came to be."""
        self._modes(mode or "unknown").inc()

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Body and content type of `/metrics`, in the format that the scraper's Accept header prefers."""
        self.token_gap_s.flush()
        return exposition(self._registry, accept)
