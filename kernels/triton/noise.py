"""Counter-based sampling noise on the device: the same numbers as the host's sampler draws with.

Token `t` gets output `t` of a SplitMix64 generator (Steele, Lea and Flood 2014) whose state is the row's key. The top
31 bits become Gumbel noise.
"""
# mypy: allow-untyped-calls, disable-error-code="no-untyped-def, untyped-decorator, misc"

import triton
import triton.language as tl


@triton.jit
def gumbel_noise(
    key,  # int64, of the row
    token,  # int32 [N]
):
    """Return standard Gumbel noise in about [-2.9, 22.2]: fp32 `[N]`."""
    GOLDEN: tl.constexpr = 0x9E3779B97F4A7C15
    FIRST: tl.constexpr = 0xBF58476D1CE4E5B9
    SECOND: tl.constexpr = 0x94D049BB133111EB
    z = key.to(tl.uint64, bitcast=True) + (token + 1).to(tl.uint64) * GOLDEN
    z = (z ^ (z >> 30)) * FIRST
    z = (z ^ (z >> 27)) * SECOND
    bits = (z >> 33).to(tl.int32)  # the generator's last scramble leaves these as they are
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * (1.0 / (1 << 31)), 1.0 - 1.0 / (1 << 24))
    # -log1p(-uniform): small values, which decide who wins, keep their precision (Kahan's correction of a rounded sum).
    rest = 1.0 - uniform
    rounded = rest - 1.0
    exponential = tl.where(rest == 1.0, uniform, tl.log(rest) * (uniform / tl.where(rest == 1.0, 1.0, rounded)))
    return -tl.log(exponential)
