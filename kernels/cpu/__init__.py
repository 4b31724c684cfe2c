"""The native CPU backend: C++ compiled for this machine, one call per decoder step. Specified in `kernels.reference`.

`build` compiles and caches the library, `library` is its C interface, `packed_linear` and `decoder_step` use it. The
residual stream is float32 throughout; equal bits whatever shares a step, however a prompt is chunked, on any number of
threads (of one instruction set).
"""
