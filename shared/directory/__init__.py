"""The KV directory in Redis: who is there, and who probably has which block. A hint, never truth."""
