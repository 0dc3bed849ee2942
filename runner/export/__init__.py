"""Write a run's adapter and its base model in formats that other programs load."""
