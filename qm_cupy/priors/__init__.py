"""Priors: small networks that predict a merged token from the tokens before it."""
