"""From files to batches: finding, decoding, augmenting and batching images."""
