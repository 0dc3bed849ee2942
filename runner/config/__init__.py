"""Settings: the schema, its checks, what a resume may change, and the reference made from them. No Hydra, no MLX."""
