"""Training and judging a drafter."""
