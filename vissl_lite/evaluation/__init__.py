"""Judging an encoder: features, kNN, linear probe, and watching a run while it trains."""
