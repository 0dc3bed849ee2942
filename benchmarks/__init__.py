"""Measurements of the runner, alone and side by side with stock mlx-lm. Run from the root of a clone."""
