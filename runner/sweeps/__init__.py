"""Sweeps: a grid of jobs, each with an identity and a folder for good, that can be finished, extended and compared."""
