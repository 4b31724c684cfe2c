"""The measurement, walked through without a GPU: it must not fail for the first time on a rented one."""

from __future__ import annotations

import os

import pytest

from loadtest.gpu.measure_kernels import measure
from loadtest.gpu.measure_model import measure as measure_model
from loadtest.gpu.measure_modes import measure as measure_modes


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the GPU runs the measurement itself")
def test_every_check_passes_and_every_row_is_rendered(tmp_path):
    report = measure("cpu")
    assert [check.name for check in report.checks if not check.passes] == []
    report.write(tmp_path, "dry")
    text = (tmp_path / "dry.md").read_text()
    assert (tmp_path / "dry.json").stat().st_size > 0
    assert all(row.name in text for row in report.rows)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the GPU runs the measurement itself")
def test_the_whole_model_measurement_runs_to_its_end(tmp_path):
    report = measure_model("cpu", num_requests=3, max_sequences=3, with_transformers=True)
    assert [check.name for check in report.checks if not check.passes] == []
    report.write(tmp_path, "dry")
    assert all(row.name in (tmp_path / "dry.md").read_text() for row in report.rows)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the GPU runs the measurement itself")
def test_the_modes_are_measured_in_one_call_that_keeps_every_group(tmp_path, monkeypatch):
    from tests.kernels.triton.interpreter import Products

    monkeypatch.setattr(Products, "in_order", True)  # it compares bits
    kept = []
    report = measure_modes("cpu", seconds=1e9, keep=kept.append)
    assert len(kept) == 4
    assert [check.name for check in report.checks if not check.passes] == []
    report.write(tmp_path, "dry")
    assert all(row.name in (tmp_path / "dry.md").read_text() for row in report.rows)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the GPU runs the measurement itself")
def test_a_measurement_that_has_no_time_left_says_what_it_skipped():
    report = measure_modes("cpu", seconds=-1.0, keep=lambda report: None)
    assert [row.name for row in report.rows if row.group == "skipped for want of time"][:2] == [
        "bits of invariant mode",
        "invariant attention",
    ]
