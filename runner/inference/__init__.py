"""What a trained adapter is used for: conversations, a server, benchmarks of lm-eval."""
