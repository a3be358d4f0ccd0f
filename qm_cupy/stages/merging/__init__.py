"""Merging: compute one token for each group, and go back to all tokens."""
