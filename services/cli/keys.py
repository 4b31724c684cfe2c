"""`tandem keys`: makes, lists and revokes API keys."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from shared.access.api_keys import KeyRecord, mint
from shared.access.key_store import open_key_store
from shared.errors import InvalidRequest

keys_app = typer.Typer(help="API keys: make, list, revoke.", no_args_is_help=True)

Where = Annotated[str, typer.Option("--where", help="A file, or `redis`; as TANDEM_GATEWAY_API_KEYS says")]
RedisUrl = Annotated[str, typer.Option(help="For --where redis")]

_COLUMNS = ("id", "tenant", "name", "priority", "requests/min", "tokens/min", "concurrent", "models", "made", "")
_REDIS = "redis://127.0.0.1:6379/0"


@keys_app.command("create")
def create(
    tenant: Annotated[str, typer.Argument(help="Whom it is for: fairness and limits are per tenant")],
    where: Where,
    name: Annotated[str, typer.Option(help="For people")] = "",
    priority: Annotated[int, typer.Option(help="Of its requests; lower is sooner")] = 0,
    requests_per_minute: Annotated[int, typer.Option(min=0, help="0 = no limit")] = 0,
    tokens_per_minute: Annotated[int, typer.Option(min=0, help="0 = no limit")] = 0,
    max_concurrent: Annotated[int, typer.Option(min=0, help="Requests under way at once; 0 = the gateway's bound")] = 0,
    model: Annotated[list[str] | None, typer.Option(help="A served model that it may use; repeat; none = all")] = None,
    redis_url: RedisUrl = _REDIS,
) -> None:
    """Makes a key and shows it, once: only its hash is kept."""
    key, record = mint(
        tenant,
        name=name,
        priority=priority,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrent=max_concurrent,
        models=tuple(model or ()),
    )
    asyncio.run(open_key_store(where, redis_url).put(record))
    Console(soft_wrap=True).print(key, highlight=False)


@keys_app.command("list")
def list_keys(where: Where, redis_url: RedisUrl = _REDIS) -> None:
    """Shows what is kept."""
    table = Table()
    for column in (
        "id",
        "tenant",
        "name",
        "priority",
        "requests/min",
        "tokens/min",
        "concurrent",
        "models",
        "made",
        "",
    ):
        table.add_column(column)
    for record in asyncio.run(open_key_store(where, redis_url).records()).values():
        table.add_row(*_row(record))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@keys_app.command("revoke")
def revoke(key_id: str, where: Where, redis_url: RedisUrl = _REDIS) -> None:
    """Makes a key useless within seconds; its record stays."""
    asyncio.run(_revoke(key_id, where, redis_url))


async def _revoke(key_id: str, where: str, redis_url: str) -> None:
    store = open_key_store(where, redis_url)
    record = (await store.records()).get(key_id)
    if record is None:
        raise InvalidRequest(f"no key {key_id!r} in {where}")
    await store.put(msgspec.structs.replace(record, is_revoked=True))


def _row(record: KeyRecord) -> list[str]:
    limits = (record.requests_per_minute, record.tokens_per_minute, record.max_concurrent)
    return [
        record.key_id,
        record.tenant,
        record.name,
        str(record.priority),
        *(str(limit or "-") for limit in limits),
        ", ".join(record.models) or "all",
        time.strftime("%Y-%m-%d", time.gmtime(record.created_at)),
        "revoked" if record.is_revoked else "",
    ]
