"""Merging: one token for each group, and back to all tokens."""
