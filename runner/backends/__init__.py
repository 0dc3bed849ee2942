"""What computes losses and gradients: MLX, or the engine for CPUs. One protocol."""
