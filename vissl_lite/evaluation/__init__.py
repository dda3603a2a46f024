"""Evaluation of encoders: features, kNN, linear probe, embeddings, online evaluation."""
