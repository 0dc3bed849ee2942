"""Base models: where they come from, how adapters are put on them, and their forward pass."""
