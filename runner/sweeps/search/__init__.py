"""hydra/sweeper=search: trials that a sampler suggests and rungs compare, over jobs that pause and continue exactly."""
