"""Configs and command lines of other programs as our overrides: `runner import`. Plain Python: no Hydra, no MLX."""
