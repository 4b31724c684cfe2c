"""Puts the gateway's parts together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib import metadata

from services.gateway.access.admission import Admission
from services.gateway.access.keyring import Keyring
from services.gateway.access.rate_limits import RateLimits
from services.gateway.batches.execute import execute
from services.gateway.batches.files import FileStore
from services.gateway.batches.records import BatchRecords
from services.gateway.batches.runner import BatchRunner
from services.gateway.gateway import Gateway
from services.gateway.health import Health
from services.gateway.metrics import RequestMetrics
from services.gateway.object_store import ObjectStore
from services.gateway.pipeline import Pipeline
from services.gateway.requests.grammar_check import GrammarCheck
from services.gateway.requests.text_work import TextWork
from services.gateway.responses.runs import BackgroundRuns
from services.gateway.responses.store import ResponseStore
from services.gateway.served_model import ServedModel
from services.gateway.sessions.dispatcher import Dispatcher
from services.gateway.sessions.workers import Workers
from services.gateway.settings import GatewaySettings
from shared.access.key_store import KnownKeys, open_key_store
from shared.directory.client import Directory
from shared.identity import new_incarnation


@asynccontextmanager
async def assemble(
    settings: GatewaySettings, model: ServedModel, directory: Directory, gateway_id: str
) -> AsyncIterator[Gateway]:
    """A gateway connected to its workers, until the block is left."""
    text_work, metrics = TextWork(), RequestMetrics(model.name)
    workers = Workers(directory, gateway_id, model.name, metrics.token_gap_s, settings.tls)
    grammar_check = GrammarCheck(model, timeout_s=settings.grammar_timeout_s)
    dispatcher = Dispatcher(
        directory,
        workers,
        policy=settings.placement,
        min_remote_tokens=settings.min_remote_tokens,
        timeout_s=settings.request_timeout_s,
    )
    objects = ObjectStore(settings.redis_url)
    responses = ResponseStore(
        objects,
        ttl_s=settings.response_ttl_s,
        max_bytes=settings.max_stored_bytes,
        alive_s=settings.background_alive_s,
    )
    background = BackgroundRuns(responses, settings.max_background_responses)
    limits = RateLimits(settings.redis_url if settings.api_keys else "")
    admission = Admission(
        limits,
        max_concurrent=settings.max_concurrent_requests,
        max_tenant_concurrent=settings.max_tenant_requests,
    )
    known = KnownKeys(open_key_store(settings.api_keys, settings.redis_url)) if settings.api_keys else None
    files, batches = FileStore(settings.files_dir, settings.file_ttl_s), BatchRecords(objects, settings.batch_ttl_s)
    workers.start()
    batch_work: asyncio.Task[None] | None = None
    try:
        gateway = Gateway(
            model=model,
            settings=settings,
            pipeline=Pipeline(model, settings, workers, dispatcher, text_work, grammar_check, metrics, admission),
            health=Health(directory, workers),
            metrics=metrics,
            responses=responses,
            background=background,
            files=files,
            batches=batches,
            admission=admission,
            keyring=Keyring(known, settings.api_key.get_secret_value()),
            version=_version(),
        )
        runner = BatchRunner(batches, files, gateway.keyring, settings, new_incarnation(), partial(execute, gateway))
        batch_work = asyncio.create_task(runner.run())
        yield gateway
    finally:
        if batch_work is not None:
            batch_work.cancel()
            await asyncio.gather(batch_work, return_exceptions=True)
        await background.close()
        await admission.close()
        await objects.close()
        await workers.close()
        text_work.close()
        grammar_check.close()


def _version() -> str:
    try:
        return metadata.version("tandem")
    except metadata.PackageNotFoundError:  # run from a checkout that was not installed
        return "0+unknown"
