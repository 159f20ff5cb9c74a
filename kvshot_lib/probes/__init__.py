"""Diagnostics: queries, gradients, attention shift, read-out."""
