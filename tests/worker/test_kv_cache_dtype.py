"""Which element type a worker's KV cache gets."""

import pytest
import torch

from kernels.backend import load_backend
from shared.errors import ConfigurationError
from shared.worker.loading import _kv_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize("wanted", ["auto", "float32", "bfloat16", "int8"])
def test_reference_caches_in_any_dtype(wanted):
    expected = "float32" if wanted == "auto" else wanted
    assert _kv_dtype(wanted, "float32", load_backend("reference", CPU)) == expected


@pytest.mark.parametrize(("wanted", "dtype"), [("int8", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_torch_backend_refuses_another_dtype_than_the_weights(wanted, dtype):
    with pytest.raises(ConfigurationError, match=f"kv_cache_dtype is {wanted}.*weights' {dtype} only"):
        _kv_dtype(wanted, dtype, load_backend("cpu", CPU))
