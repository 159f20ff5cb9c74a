"""The frozen model: loading it, reading its state, and what drafters borrow from it."""
