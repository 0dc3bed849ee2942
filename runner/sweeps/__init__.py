"""Sweeps: jobs that are planned and recorded before the first starts, and can be finished, extended and compared."""
