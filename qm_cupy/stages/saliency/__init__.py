"""Saliency: how much each token matters."""
