"""Checkpoints: committed whole or not at all, verified before use, retained by a pure policy.

``store`` commits, repairs and rotates; ``verify`` reads; ``manifest`` is the file that seals a checkpoint; ``mirror``
keeps a backup; ``retention`` and ``save_policy`` decide; ``safetensors_file`` reads and writes tensors.
Nothing here imports MLX or depends on the training loop.
"""
