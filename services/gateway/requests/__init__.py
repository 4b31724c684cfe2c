"""From bytes to a request that is understood: bodies, validation, prompts."""
