"""From files to batches: find, decode, augment, batch. Knows nothing of encoders or pretexts."""
