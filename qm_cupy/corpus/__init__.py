"""Readers and writers of files of token arrays."""
