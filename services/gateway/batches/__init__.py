"""OpenAI's Files and Batch APIs: many requests from a file, at low priority, results on disk."""
