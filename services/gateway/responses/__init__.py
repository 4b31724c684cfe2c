"""OpenAI's Responses API: a chat with items for messages, kept in Redis so that the next turn can name the last."""
