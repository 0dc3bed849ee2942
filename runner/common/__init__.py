"""What every package may use: errors, atomic files, caches, bounded JSON and YAML, text for messages."""
