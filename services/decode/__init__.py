"""The decode service: gets a prompt's KV, computes what is left, and generates.

Reading order: `servicer`, `gateway_stream`, `session`.
"""
