"""Figures (no torch)."""
