"""Rounds values to the cache's element type."""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

import triton
import triton.language as tl


@triton.jit
def narrow(
    x,  # any float
    to: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Return `x` in type `to`; beyond LARGEST it saturates (0 = it need not): not every target's conversion does."""
    if LARGEST > 0.0:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -LARGEST), LARGEST)
    return x.to(to)
