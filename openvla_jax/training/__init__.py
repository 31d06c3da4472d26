"""Training: mesh and shardings, state, step, loop, checkpoints, metrics."""
