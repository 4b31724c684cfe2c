"""Text to token ids and back, from a checkpoint's own files. Imports neither torch nor transformers."""
