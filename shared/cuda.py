"""CUDA's bindings, imported when they are used: a worker on a CPU does without."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigurationError


def cuda_runtime() -> Any:
    """The bindings of the runtime.

    Raises:
        ConfigurationError: They are not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as exc:
        raise ConfigurationError(f"device memory is shared through cuda.bindings, which is missing: {exc}") from exc
    return runtime


def cuda_driver() -> Any:
    """The bindings of the driver; what they do is done in the context that the runtime made this thread's."""
    from cuda.bindings import driver

    return driver


def checked(result: tuple[Any, ...]) -> Any:
    """The value of a CUDA call, or its values.

    Raises:
        ConfigurationError: It failed.
    """
    if int(result[0]) != 0:
        raise ConfigurationError(f"CUDA: {result[0].name}")
    values = result[1:]
    return values[0] if len(values) == 1 else values


def page_locked(size: int) -> npt.NDArray[np.uint8]:
    """Host memory that copies from and to a device reach at the speed of the bus; uint8 `[size]`, kept for good."""
    pointer = int(checked(cuda_runtime().cudaHostAlloc(size, 0)))
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))
