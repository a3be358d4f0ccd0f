"""The stages: one folder for each, one file for each operation."""
