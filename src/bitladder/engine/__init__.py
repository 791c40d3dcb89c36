"""The only door to native code: libllama and libggml through llama-cpp-python's low-level bindings."""
