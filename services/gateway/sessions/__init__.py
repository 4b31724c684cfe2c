"""From a request that is understood to tokens: placement, the streams to workers, migration."""
