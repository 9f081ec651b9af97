"""Evaluation: samples by number, their features, and metrics that say where they come from."""
