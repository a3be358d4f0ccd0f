"""Clustering: tokens to groups by cosine similarity."""
