"""What the checked-in tables of resources say, read without compiling: also that of a Triton that is not installed."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.triton.offline_compiler import TARGETS
from tests.kernels.triton.resource_table import checked_in, versions


@pytest.mark.parametrize("version", versions())
def test_every_target_has_rows_and_none_spills(version):
    table = checked_in(version)
    assert table.keys() == TARGETS.keys()
    rows = [(f"{target}: {name}", found) for target, kernels in table.items() for name, found in kernels.items()]
    assert [f"{name}: {found}" for name, found in rows if found.spill_bytes] == []


def test_every_version_has_the_same_rows():
    first, *others = ({target: set(rows) for target, rows in checked_in(version).items()} for version in versions())
    assert all(other == first for other in others)
