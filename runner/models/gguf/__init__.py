"""Read llama-family GGUF files as mlx-lm models, configs and tokenizers."""
