"""Training: the loop, the step, the loss, optimizers and schedules, evaluation and state."""
