"""Loading a model whose packed weights are shared gives the model that private weights give."""

import shutil
import uuid
from pathlib import Path

import pytest
import torch

from kernels.backend import load_backend
from kernels.cpu.build import COMPILERS
from kernels.quantization import Quantization
from shared.models import native_weights
from shared.models.config import ModelConfig
from shared.models.load import load_decoder
from shared.models.resolve import resolve_model

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")


@pytest.fixture
def shared_memory():
    directory = Path("/dev/shm") / f"tandem-test-{uuid.uuid4().hex}"
    if not directory.parent.is_dir():
        pytest.skip("no /dev/shm here")
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


def head_of_ones(quantization, share_in):
    directory = resolve_model("pydoc-mini")
    config = ModelConfig.from_pretrained(directory)
    backend = load_backend("native", CPU, torch.bfloat16, quantization)
    model = load_decoder(
        directory, config, dtype="bfloat16", device=CPU, backend=backend, share_weights_in=share_in
    )  # fmt: skip
    x = torch.ones(2, config.hidden_size)
    return torch.cat([model.logits(x), *(layer.gate_up(x) for layer in model._layers)], 1)


@pytest.mark.parametrize("quantization", list(Quantization))
def test_shared_weights_equal_private_ones_packed_or_mapped(quantization, shared_memory):
    private = head_of_ones(quantization, None)
    assert head_of_ones(quantization, shared_memory).equal(private)
    assert head_of_ones(quantization, shared_memory).equal(private)


def test_worker_keeps_its_own_weights_with_a_warning_where_they_cannot_be_shared(shared_memory, monkeypatch):
    def fails(*_):
        raise OSError("No space left on device")

    warnings = []
    monkeypatch.setattr(native_weights, "weight_file", fails)
    monkeypatch.setattr(native_weights.log, "warning", lambda event, **fields: warnings.append((event, fields["part"])))
    head_of_ones(Quantization.NONE, shared_memory)
    assert warnings == [("weights_not_shared", "body"), ("weights_not_shared", "head")]
