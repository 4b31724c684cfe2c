"""The Compose file against what the services accept; bringing it up for real needs Docker and is not done here."""

import re
from pathlib import Path

import pytest
import yaml

from services.gateway.settings import GatewaySettings
from services.kv_transfer.settings import TransferSettings
from shared.worker.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "compose" / "compose.yaml").read_text())
SERVICES = {name: service for name, service in COMPOSE["services"].items() if name != "redis"}
DEFAULTS = dict(
    line.split("=", 1) for line in (ROOT / "compose" / ".env").read_text().splitlines() if not line.startswith("#")
)


def environment(name: str) -> dict[str, str]:
    """As Compose passes it on, with the defaults of `.env`."""
    values = SERVICES[name]["environment"]
    return {key: re.sub(r"\$\{(\w+)\}", lambda match: DEFAULTS[match[1]], value) for key, value in values.items()}


def settings(name: str):
    cls = {"tandem-gateway": GatewaySettings, "tandem-worker": WorkerSettings, "tandem-kv-transfer": TransferSettings}
    return cls[SERVICES[name]["image"]].from_environment()


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_accepts_its_settings(monkeypatch, name):
    for key, value in environment(name).items():
        monkeypatch.setenv(key, value)
    assert settings(name)


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_a_worker_and_its_sidecar_share_memory_and_socket(name):
    worker, sidecar = SERVICES[name], SERVICES[f"{name}-transfer"]
    assert f"{name}:/run/tandem" in worker["volumes"]
    assert f"{name}:/run/tandem" in sidecar["volumes"]
    ours, theirs = environment(name), environment(f"{name}-transfer")
    assert ours["TANDEM_WORKER_TRANSFER_SOCKET"] == theirs["TANDEM_TRANSFER_SOCKET"]
    assert ours["TANDEM_WORKER_WORKER_ID"] == theirs["TANDEM_TRANSFER_WORKER_ID"]
    assert ours["TANDEM_WORKER_ARENA_DIR"] == "/run/tandem"


@pytest.mark.parametrize("name", SERVICES)
def test_containers_run_with_as_little_as_they_need(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    dockerfile = (ROOT / service["build"]["dockerfile"]).read_text()
    assert re.search(r"^USER tandem$", dockerfile, re.MULTILINE)


def test_only_the_gateway_is_published_and_only_to_this_machine():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"gateway": ["127.0.0.1:${TANDEM_PORT}:8000"]}
