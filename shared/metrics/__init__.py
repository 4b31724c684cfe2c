"""Prometheus metrics: each role's names are declared once, in one module; `http` serves them beside the health probes.

Names equal vLLM's (`vllm:...`) where the meaning is equal, so that dashboards and autoscalers made for it work; the
rest is `tandem_...`. Units are in the name; labels have few values.
"""
