"""LoRA adapters in the format of PEFT: the names of their layers, and reading them."""
