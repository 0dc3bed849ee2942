"""What a person sees: progress while a run trains, and a summary at its end. Knows records and files only."""
