"""Fidelity: how much of the tokens is lost by merging."""
