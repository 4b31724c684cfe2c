"""What the protocol asks about the server and its model."""

from __future__ import annotations

from services.gateway.gateway import Gateway
from services.gateway.kserve.inference import INPUTS, MODEL_VERSION, OUTPUTS

PLATFORM = "tandem"
EXTENSIONS = ("binary_tensor_data", "parameters", "generate", "model_configuration", "model_repository")


def server_metadata(gateway: Gateway) -> dict[str, object]:
    """`GET /v2`."""
    return {"name": PLATFORM, "version": gateway.version, "extensions": list(EXTENSIONS)}


def model_metadata(gateway: Gateway) -> dict[str, object]:
    """`GET /v2/models/{name}`. A shape of -1 is the number of prompts."""
    return {
        "name": gateway.model.name,
        "versions": [MODEL_VERSION],
        "platform": PLATFORM,
        "inputs": [_tensor(name, datatype, "text_input") for name, datatype in INPUTS.items()],
        "outputs": [_tensor(name, datatype, name) for name, datatype in OUTPUTS.items()],
    }


def model_config(gateway: Gateway) -> dict[str, object]:
    """`GET /v2/models/{name}/config`: the fields of Triton's configuration that mean something here."""
    return {
        "name": gateway.model.name,
        "platform": PLATFORM,
        "max_batch_size": 0,
        "backend": PLATFORM,
        "model_transaction_policy": {"decoupled": True},
    }


def repository_index(gateway: Gateway) -> list[dict[str, str]]:
    """`POST /v2/repository/index`."""
    reason = gateway.health.reason()
    state = "UNAVAILABLE" if reason else "READY"
    return [{"name": gateway.model.name, "version": MODEL_VERSION, "state": state, "reason": reason}]


def _tensor(name: str, datatype: str, counted: str) -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": [-1 if name == counted else 1]}
