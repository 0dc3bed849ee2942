"""Configs composed by Hydra, checked and stored. Beside sweeps/ the only importer of Hydra and OmegaConf."""
