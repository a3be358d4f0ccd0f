"""Merging: groups to one token each, and back."""
