"""The prefill service: computes prompts' full blocks, seals them, and keeps them pinned while its caller fetches."""
