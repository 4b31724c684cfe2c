"""Load and benchmarks against a running suite. A black box: HTTP only, no import of the suite's code."""
