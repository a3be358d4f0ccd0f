"""The command line `qm-cupy`."""
