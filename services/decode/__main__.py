"""`python -m services.decode`: one decode worker."""

from __future__ import annotations

from services.decode.servicer import DecodeServicer
from shared.lifecycle import run_service
from shared.worker.process import worker_main
from shared.worker.settings import WorkerSettings


def main() -> None:
    """Entry point."""
    run_service(lambda stop: worker_main(WorkerSettings.from_environment(), "decode", DecodeServicer, stop), "decode")


if __name__ == "__main__":
    main()
