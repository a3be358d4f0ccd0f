"""Saliency: a number for each token that says how important the token is."""
