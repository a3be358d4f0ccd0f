"""Priors: small networks that predict a merged token from those before it."""
