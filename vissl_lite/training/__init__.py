"""Training with Lightning: hardware, schedule, stream, callbacks and checkpoints."""
