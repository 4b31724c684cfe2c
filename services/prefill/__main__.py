"""`python -m services.prefill`: one prefill worker."""

from __future__ import annotations

from services.prefill.servicer import PrefillServicer
from shared.lifecycle import run_service
from shared.worker.process import worker_main
from shared.worker.settings import WorkerSettings


def main() -> None:
    """Entry point."""
    run_service(
        lambda stop: worker_main(WorkerSettings.from_environment(), "prefill", PrefillServicer, stop), "prefill"
    )


if __name__ == "__main__":
    main()
