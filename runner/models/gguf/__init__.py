"""GGUF files of the llama family as models, configs and tokenizers of mlx-lm."""
