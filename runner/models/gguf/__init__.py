"""Read GGUF files as mlx-lm models, configs and tokenizers."""
