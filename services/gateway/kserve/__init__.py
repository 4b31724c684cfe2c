"""KServe's Open Inference Protocol, version 2, over HTTP and gRPC; tensors named as in Triton's backend for vLLM."""
