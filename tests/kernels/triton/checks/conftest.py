"""Where the checks run: in the repaired interpreter if TRITON_INTERPRET=1 is set, else on the GPU.

Either way fresh tensors hold NaN instead of luck. The files are named `check_*` so that a plain pytest run, whose
process must not be an interpreting one, does not collect them.
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


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` is where the ops get their outputs: an element that no program writes stays NaN (or 77)."""
    torch.manual_seed(7)
    empty = torch.empty

    def poisoned(*args: Any, **named: Any) -> torch.Tensor:
        made = empty(*args, **named)
        return made.fill_(float("nan") if made.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
