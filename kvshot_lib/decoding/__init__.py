"""Lossless speculative decoding, and what it costs."""
