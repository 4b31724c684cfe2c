"""`python -m services.kv_transfer`: the sidecar of one worker."""

from __future__ import annotations

from services.kv_transfer.service import transfer_main
from services.kv_transfer.settings import TransferSettings
from shared.lifecycle import run_service


def main() -> None:
    """Entry point."""
    run_service(lambda stop: transfer_main(TransferSettings.from_environment(), stop), "kv_transfer")


if __name__ == "__main__":
    main()
