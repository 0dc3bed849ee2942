"""Data sets that ship with the runner."""
