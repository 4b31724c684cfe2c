"""What the services share: block identity, the engine, the KV directory, the transfer plane, RPC, observability."""
