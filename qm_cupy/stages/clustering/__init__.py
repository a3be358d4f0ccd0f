"""Clustering: put tokens into groups by cosine similarity."""
