"""Alignment: how well a prior predicts the merged tokens, and decoding."""
