"""The full-precision model's predictions, made once and kept: hidden states, or llama-perplexity's file."""
