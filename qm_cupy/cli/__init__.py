"""The commands of the command line `qm-cupy`."""
