"""Moves KV blocks between two processes, from one arena straight into another.

    protocol.py   what is said on the wire; no I/O
    transport.py  the seam: endpoints that carry a byte stream and tagged blocks
    ucx.py        the real one; the only module that touches ucxx
    loopback.py   the same within one process, for unit tests
    receiver.py   the pulling side
    sender.py     the serving side, with grants.py
    checksum.py   how both sides name a block's bytes
    sleepless_thread.py  whether UCX spins

Used by the kv_transfer service alone: malformed connect bytes can abort a process that runs UCX, and that must never be
the engine.
"""
