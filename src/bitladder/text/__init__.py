"""Texts: loaded, cut into chunks of tokens, excerpted, and set apart."""
