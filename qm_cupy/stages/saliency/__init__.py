"""Saliency: how important each token is."""
