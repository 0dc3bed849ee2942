"""The directory of a run: layout, claim, lock, status, rows. Files only: no MLX, no Hydra."""
