"""What the probes say, and why."""

from __future__ import annotations

from services.gateway.sessions.placement import can_take_work
from services.gateway.sessions.workers import Workers
from shared.directory.client import Directory


class Health:
    """Ready while a decode worker is connected; a lost directory alone changes nothing: last-known workers serve on."""

    def __init__(self, directory: Directory, workers: Workers) -> None:
        self._directory = directory
        self.workers = workers

    def reason(self) -> str:
        """Why the gateway is not ready; "" when it is."""
        if any(can_take_work(worker) for worker in self.workers.decode_workers()):
            return ""
        if not self._directory.healthy:
            return "the directory (Redis) does not answer, and no decode worker is known"
        return "no decode worker of the served model is connected and ready"

    def report(self) -> dict[str, object]:
        """The body of `/ready`."""
        reason = self.reason()
        snapshot = self.workers.snapshot()
        return {
            "status": "ok" if not reason else "not ready",
            "reason": reason,
            "directory": "ok" if self._directory.healthy else "down",
            "decode_workers": [worker.worker_id for worker in snapshot.decode_workers if can_take_work(worker)],
            "prefill_workers": [worker.worker_id for worker in snapshot.prefill_workers if can_take_work(worker)],
        }
