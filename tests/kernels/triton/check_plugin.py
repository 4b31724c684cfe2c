"""Pytest plugin for `checks/`: in the repaired interpreter if TRITON_INTERPRET=1 is set, else on the GPU.

    python -m pytest -p tests.kernels.triton.check_plugin -o python_files='check_*.py' tests/kernels/triton/checks

Either way fresh tensors hold NaN instead of luck. A plugin and not a conftest, and files named `check_*`, because a
plain pytest run must neither interpret its kernels nor get another default device.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from tests.kernels.triton.interpreter import install

    install()
    torch.set_num_threads(1)
else:
    torch.set_default_device("cuda")
    torch.empty(0)  # torch lists the functions that obey the default device on first use: before one is patched


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` is where the ops get their outputs: an element that no program writes stays NaN (or 77)."""
    torch.manual_seed(7)
    empty = torch.empty

    def poisoned(*args: Any, **named: Any) -> torch.Tensor:
        made = empty(*args, **named)
        return made.fill_(float("nan") if made.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
