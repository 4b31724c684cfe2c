"""Compute kernels: one op per file, several backends with equal signatures, chosen once at start by `kernels.backend`.

    reference   slow, obvious torch on any device: the oracle of every test
    cpu_torch   plain torch for CPUs
    triton      CUDA and ROCm

Imports nothing of this project, so it is usable alone; and this module imports neither torch nor triton.
"""
