"""Comparing encoders on the same few labels: what is run, what it means, how it is shown."""
