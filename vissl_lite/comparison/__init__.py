"""Comparing encoders on the same few labels: plan, runs, statistics, results."""
