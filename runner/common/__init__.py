"""What every package may use: errors, files, JSON, YAML, the cache directory."""
