"""runner: config-driven LoRA fine-tuning with MLX; every run resumes exactly from its output directory."""

__version__ = "0.3.0"
