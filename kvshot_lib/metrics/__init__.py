"""Counts, intervals, comparisons, claims and tables (no torch)."""
