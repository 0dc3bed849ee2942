"""Sweeper and launchers for Hydra, which imports this package at every start: nothing heavy is imported here."""
