"""Checkpoints: committed whole or not at all, verified before use, rotated by a pure policy.

``store`` commits, repairs and rotates; ``verify`` reads; ``manifest`` is the file that seals a checkpoint;
``disk`` touches the file system; ``retention`` and ``schedule`` decide; ``tensors`` is safetensors.
Nothing here imports MLX or knows the training loop.
"""
