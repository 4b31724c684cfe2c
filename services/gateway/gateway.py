"""What the routes share: made once by `assembly`, handed to every router."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from services.gateway.access.admission import Admission
from services.gateway.access.keyring import Keyring
from services.gateway.batches.files import FileStore
from services.gateway.batches.records import BatchRecords
from services.gateway.health import Health
from services.gateway.metrics import RequestMetrics
from services.gateway.pipeline import Pipeline
from services.gateway.responses.runs import BackgroundRuns
from services.gateway.responses.store import ResponseStore
from services.gateway.served_model import ServedModel
from services.gateway.settings import GatewaySettings
from shared.errors import TandemError

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Gateway:
    """The parts of one gateway that its routes need."""

    model: ServedModel
    settings: GatewaySettings
    pipeline: Pipeline
    health: Health
    metrics: RequestMetrics
    responses: ResponseStore
    background: BackgroundRuns
    files: FileStore
    batches: BatchRecords
    admission: Admission
    keyring: Keyring
    version: str

    def note_failure(self, error: TandemError) -> None:
        """Counts and logs a request that is answered with an error."""
        self.metrics.request_failed(error.code)
        log.info("request_failed", code=error.code, error=error.message)
