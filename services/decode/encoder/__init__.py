"""A worker of an encoder checkpoint: it embeds and generates nothing, so it has no KV and no kv_transfer."""
