"""The Triton backend can stand in for the reference: the same ops, called the same way."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import kernels.reference as reference
import kernels.triton as triton_ops
from kernels.backend import Ops

OPS = [name for name in vars(Ops) if not name.startswith("_")]


@pytest.mark.parametrize("name", OPS)
def test_every_op_exists_with_the_same_parameters(name):
    expected = inspect.signature(getattr(reference, name)).parameters
    found = inspect.signature(getattr(triton_ops, name)).parameters
    assert [(p.name, p.kind) for p in found.values()] == [(p.name, p.kind) for p in expected.values()]
