"""Runs as folders that other programs load."""
