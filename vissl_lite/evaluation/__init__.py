"""Evaluation of encoders: features, kNN, linear and attentive probe, online evaluation."""
