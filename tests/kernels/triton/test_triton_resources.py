"""Every kernel compiles for every target without a GPU, fits, spills nothing and costs no more than a table says."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tests.kernels.triton.forks import Command
from tests.kernels.triton.offline_compiler import TARGETS, fits
from tests.kernels.triton.resource_table import VERSION, checked_in, parse, regressions, versions

MATRIX = {
    "sm_90": {"decode": "mma", "prefill": "wgmma"},
    "sm_100": {"decode": "mma", "prefill": "tcgen05"},
    "gfx942": {"decode": "mfma", "prefill": "mfma"},
    "sm_80": {"decode": "mma", "prefill": "mma"},
    "gfx950": {"decode": "mfma", "prefill": "mfma"},
}
"""The decode tile has too few rows for wgmma (64) and tcgen05 (128). What takes longest comes first: see `runs`."""

SAME_BITS = [
    (f"{left} / {kernel}", f"{right} / {kernel}")
    for left, right, kernel in [
        ("invariant decode d128 page16", "invariant prefill d128 page16", "invariant_attention_kernel"),
        ("invariant linear 1 row", "invariant linear 2048 rows", "invariant_linear_kernel"),
    ]
]
"""Two forms of one kernel whose results must not differ: they issue the same matrix instructions."""


def command(target):
    return Command("tests.kernels.triton.resource_table", [target], {})


@pytest.mark.timeout(660)
@pytest.mark.parametrize("target", sorted(TARGETS, key=list(MATRIX).index))
def test_kernels_compile_and_stay_within_the_checked_in_resources(runs, target):
    run = runs(target)
    assert run.code == 0, run.stderr[-4000:]
    found = parse(run.stdout)
    for name, resources in found.items():
        assert resources.spill_bytes == 0, f"{name}: {resources}"
        assert resources.programs >= 1, f"{name}: {resources}"
        assert fits(resources, target), f"{name}: {resources}"
        for phase, unit in MATRIX[target].items():
            if f"{phase}_split_kernel" in name or f"{phase}_kernel" in name:
                assert resources.matrix == unit, f"{name}: {resources}"
    for form, other in SAME_BITS:
        assert found[form].shapes == found[other].shapes, f"{form}: {found[form]}, {other}: {found[other]}"
    if VERSION not in versions():
        pytest.skip(f"tables are of triton {', '.join(versions())}, this is {VERSION}: registers not compared")
    table = checked_in(VERSION)[target]
    assert found.keys() == table.keys()
    assert regressions(found, table) == []
