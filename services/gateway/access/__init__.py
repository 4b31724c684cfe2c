"""Who calls, what they may, and how much: keys, rate limits, bounded concurrency per tenant."""
