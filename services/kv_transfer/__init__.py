"""The KV-transfer service: stands beside one worker, moves sealed blocks between arenas, and alone has UCX in it.

worker  -- Attach, Pull, Save, Publish (Unix socket) -->  control.py
peers   -- Fetch (TCP) ------------------------------->  fetch.py
pull.py asks a peer's Fetch; holdings.py knows what can be sent; host_tier.py keeps what the worker evicts
"""
