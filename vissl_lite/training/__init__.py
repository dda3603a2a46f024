"""Training on Lightning: where, how long, from which stream, with which checkpoints."""
