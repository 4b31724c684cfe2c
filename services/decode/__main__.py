"""`python -m services.decode`: one decode worker."""

from __future__ import annotations

import asyncio

from services.decode.encoder.process import encoder_main
from services.decode.servicer import DecodeServicer
from shared.lifecycle import run_service
from shared.models.encoder_config import is_encoder
from shared.models.resolve import resolve_model
from shared.worker.process import worker_main
from shared.worker.settings import WorkerSettings


def main() -> None:
    """Entry point."""
    run_service(_serve, "decode")


async def _serve(stop: asyncio.Event) -> None:
    """The checkpoint says whether there is anything to generate."""
    settings = WorkerSettings.from_environment()
    directory = await asyncio.to_thread(resolve_model, settings.model)
    if is_encoder(directory):
        await encoder_main(settings, directory, stop)
    else:
        await worker_main(settings, "decode", DecodeServicer, stop)


if __name__ == "__main__":
    main()
