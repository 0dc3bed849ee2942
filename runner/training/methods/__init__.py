"""Training methods: what an update minimizes, and how an evaluation measures it. The loop is the same for all."""
