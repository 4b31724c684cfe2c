"""Measures the GPU kernels: correctness against float64, speed against what the same device can do at most."""
