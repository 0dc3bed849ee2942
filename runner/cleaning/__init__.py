"""Removing what runs no longer need: decided by a pure function, and carried out so that a kill leaves no half."""
