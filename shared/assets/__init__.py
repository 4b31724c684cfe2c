"""Bundled model assets: the `pydoc-mini` checkpoint and the recipe that trains it."""
