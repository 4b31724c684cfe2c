"""Which element type a worker's KV cache gets."""

import pytest
import torch

import kernels.reference
from kernels.backend import Backend, load_backend
from kernels.dense_linear import dense_linear
from shared.errors import ConfigurationError
from shared.kv_arena import KvLayout
from shared.models.config import ModelConfig
from shared.models.fingerprint import model_fingerprint
from shared.models.resolve import resolve_model
from shared.worker.loading import _kv_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize("wanted", ["auto", "float32", "bfloat16", "int8"])
def test_reference_caches_in_any_dtype(wanted):
    expected = "float32" if wanted == "auto" else wanted
    assert _kv_dtype(wanted, "float32", load_backend("reference", CPU)) == expected


def test_fp8_is_the_encoding_of_the_device_and_of_the_fingerprint():
    assert _kv_dtype("fp8", "bfloat16", load_backend("reference", CPU)) == "float8_e4m3fn"
    on_gfx942 = Backend("triton", ops=kernels.reference, linear=dense_linear, head=dense_linear,
                        kv_dtypes=frozenset({"float8_e4m3fnuz"}))  # fmt: skip
    assert _kv_dtype("fp8", "bfloat16", on_gfx942) == "float8_e4m3fnuz"
    kinds = ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz"]
    layouts = [KvLayout(num_layers=2, block_size=16, num_kv_heads=2, head_dim=64, dtype=kind) for kind in kinds]
    assert [layout.block_bytes for layout in layouts] == [16384, 8192, 8192]
    directory = resolve_model("pydoc-mini")
    config = ModelConfig.from_pretrained(directory)
    assert len({model_fingerprint(directory, config, "bfloat16", layout) for layout in layouts}) == 3


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_fp8_is_refused_where_there_is_no_e4m3(name):
    without = Backend(name, ops=kernels.reference, linear=dense_linear, head=dense_linear)
    with pytest.raises(ConfigurationError, match=rf"dtype is fp8, but the {name} backend.*sm_90 on .not sm_80"):
        _kv_dtype("fp8", "bfloat16", without)


@pytest.mark.parametrize(("wanted", "dtype"), [("int8", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_torch_backend_refuses_another_dtype_than_the_weights(wanted, dtype):
    with pytest.raises(ConfigurationError, match=f"kv_cache_dtype is {wanted}.*weights' {dtype} only"):
        _kv_dtype(wanted, dtype, load_backend("cpu", CPU))
