"""`/v1/embeddings`: pooled hidden states of the served model."""
