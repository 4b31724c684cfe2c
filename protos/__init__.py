"""Protocol buffers of the suite: `*.proto` and the stubs generated from them (`make protos`)."""
