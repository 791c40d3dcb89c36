"""GGUF files: read, checked, and streamed out.

The `gguf` package decodes every token of the vocabulary into Python objects, and its writer encodes them again. A
quantizer passes metadata through untouched, so here a value stays the bytes it is until somebody asks for it: opening
a file with 50,000 tokens takes milliseconds, and what is copied cannot change.
"""
