"""Which backends keep a sequence's bits equal in every batch, and which say that they do not."""

import pytest
import torch

from kernels.backend import load_backend
from shared.errors import ConfigurationError
from shared.worker.loading import _backend
from shared.worker.settings import WorkerSettings

CPU = torch.device("cpu")


def settings(tmp_path, **changes):
    return WorkerSettings(worker_id="w", transfer_socket=tmp_path / "s", run_dir=tmp_path, **changes)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_backend_that_cannot_keep_bits_refuses_to_promise_it(tmp_path, name):
    with pytest.raises(ConfigurationError, match=f"invariant in the native and triton backends only, not in {name}"):
        _backend(settings(tmp_path, backend=name, numerics="invariant"), CPU, torch.float32)


def test_the_native_backend_is_the_same_either_way():
    one, other = (load_backend("native", CPU, torch.float32, numerics=name) for name in ("fast", "invariant"))
    assert one.numerics == other.numerics


def test_invariant_triton_workers_pair_with_their_like_only():
    pytest.importorskip("triton", reason="triton is not installed")
    one, other = (load_backend("triton", CPU, torch.bfloat16, numerics=name) for name in ("fast", "invariant"))
    assert (one.numerics, other.numerics) == ("triton", "triton-invariant")
