"""Dialogues and prompts: written, read, split."""
