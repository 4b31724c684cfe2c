"""Anthropic's Messages API: said as a chat on the way in, told in content blocks on the way out."""
