"""Declarations of operations, and their versions for torch and JAX."""
