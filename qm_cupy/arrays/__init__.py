"""Conversion of arrays, and checks of their dtypes, shapes and values."""
