"""Fidelity: what merging loses."""
