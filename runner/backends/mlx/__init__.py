"""The MLX backend: differentiation by MLX, on any device, eager or compiled."""
