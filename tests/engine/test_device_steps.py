"""The host's half of the device runner: shapes, staged arrays, the sums of memory."""

import numpy as np
import pytest
import torch

from shared.engine.device_memory import DeviceMemory
from shared.engine.staged_arrays import ArraySpec, StagedArrays
from shared.engine.step_shape import StepShape, StepShapes
from shared.errors import ConfigurationError
from shared.kv_arena import KvLayout

GIB = 1 << 30


@pytest.mark.parametrize("max_sequences", [1, 3, 8, 64, 100, 256])
def test_every_step_within_the_limits_has_a_captured_shape_that_holds_it(max_sequences):
    shapes = StepShapes(max_batch_tokens=1100, max_sequences=max_sequences, max_model_len=5000)
    captured = set(shapes.all())
    assert len(captured) == len(shapes.all())
    for rows in range(1, max_sequences + 1):
        found = shapes.fit(rows, rows, 4999, is_decode=True)
        assert found in captured
        assert found.num_sequences >= rows
        assert found.num_sequences - rows < max(8, rows // 8 + 1)
    for tokens in (1, 63, 64, 65, 1099, 1100):
        found = shapes.fit(tokens, 1, 600, is_decode=False)
        assert found in captured
        assert found.num_tokens >= tokens
        assert found.max_seq_len >= 600


def test_a_step_larger_than_any_captured_one_is_left_to_the_host():
    shapes = StepShapes(max_batch_tokens=8192, max_sequences=4, max_model_len=8192)
    assert shapes.fit(2048, 4, 8192, is_decode=False) == StepShape(2048, 4, False, 8192)
    assert shapes.fit(2049, 4, 8192, is_decode=False) is None


def test_staged_arrays_keep_their_address_and_send_only_the_rows_in_use():
    specs = [ArraySpec("ids", np.int64, (3,)), ArraySpec("table", np.int32, (4, 5))]
    arrays = StagedArrays(specs, torch.device("cpu"), num_stages=2)
    address = arrays.device["table"].data_ptr()
    for turn in (1, 2, 3):
        host = arrays.next_stage()
        host["ids"][:] = turn
        host["table"][:] = 10 * turn
        arrays.send(2)
        assert arrays.device["ids"].tolist() == [turn] * 3
        assert arrays.device["table"][:2].unique().tolist() == [10 * turn]
        assert arrays.device["table"][2:].unique().tolist() == [0]
    assert arrays.device["table"].data_ptr() == address


def test_a_host_stage_is_not_the_one_that_was_sent_last():
    arrays = StagedArrays([ArraySpec("ids", np.int64, (3,))], torch.device("cpu"), num_stages=2)
    first = arrays.next_stage()
    assert arrays.next_stage()["ids"] is not first["ids"]


def memory(weights_gib, free_gib=24.0):
    return DeviceMemory(
        total=24 * GIB,
        utilization=0.9,
        weights=int(weights_gib * GIB),
        activations=GIB,
        captured=GIB // 2,
        free=int(free_gib * GIB),
    )


LAYOUT = KvLayout(num_layers=32, block_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")


def test_blocks_fill_what_weights_and_activations_leave():
    assert memory(15).num_blocks(LAYOUT) == int((24 * 0.9 - 15 - 1.5) * GIB) // (2 << 20)


def test_blocks_take_no_more_than_others_left_free():
    assert memory(15, free_gib=3).num_blocks(LAYOUT) == int(2.5 * GIB) // (2 << 20)


def test_a_model_that_does_not_fit_is_refused_with_the_sums():
    with pytest.raises(ConfigurationError) as failure:
        memory(20.5).num_blocks(LAYOUT)
    text = str(failure.value)
    for part in ("24.00 GiB", "21.60 GiB", "20.50 GiB", "1.00 GiB", "0.50 GiB", "-0.40 GiB", "2.00 MiB"):
        assert part in text
