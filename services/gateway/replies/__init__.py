"""From tokens to bytes: text, choices, chunks, server-sent events, errors."""
