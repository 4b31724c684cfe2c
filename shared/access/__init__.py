"""Who may call: API keys, as the command line makes them and the gateway checks them. No torch."""
