"""HTTP routes, one module per endpoint family; each has `router(gateway)`."""
