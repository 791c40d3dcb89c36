"""The only door to native code: libllama and libggml through llama-cpp-python's low-level bindings.

Other packages import from its modules, because `decoding` must not load the native library and all others do:

    decoding     options: tokens, batch sizes, threads, layers on a GPU
    native       the loaded library: functions, structures, checks, log, versions
    types        tensor types, and the kernels that quantize and dequantize rows
    presets      the type that llama-quantize gives each tensor
    model        a loaded model and its vocabulary
    context      decoding: batches, logits
    observe      callbacks that watch the computation
    activations  callbacks that round or disturb activations
    weights      the weights of a loaded model, read and replaced in place
    devices      back ends, processors, thread pools, main memory
    matvec       speed of the CPU's kernels, and the type to which they round inputs
    extras       whether special layouts of weights work on this processor
    blas         threads of NumPy's matrix multiplication
"""
