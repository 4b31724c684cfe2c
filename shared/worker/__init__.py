"""What every engine process has in common: loading, the link to its kv_transfer, KV acquisition, status, drain.

Reading order: `process`, `loading`, `arena_adoption`, `sidecar_link`, `kv_acquisition`, `fetch_cost`, `block_host`,
`peers`, `status`.
"""
