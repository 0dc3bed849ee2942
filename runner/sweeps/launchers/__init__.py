"""How the jobs of a sweep are run: in this process, or each in its own."""
