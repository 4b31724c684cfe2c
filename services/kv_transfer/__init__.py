"""The KV-transfer service: stands beside one worker, moves sealed blocks between arenas, and alone has UCX in it.

worker  -- Adopt, Attach, Pulls, EndPulls, Save, Publish (Unix socket) -->  control.py
peers   -- Fetch (TCP) ------------------------------->  fetch.py
pull.py asks a peer's Fetch; holdings.py knows what can be sent: out of the arena of the attached worker
(attachment.py), of one that is gone (orphan.py), or of tiers.py, which keeps what the worker evicts in memory
(host_tier.py) and on disk (disk_tier.py)
"""
