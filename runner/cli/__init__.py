"""The command line: overrides, help, exit codes and the commands over output directories."""
