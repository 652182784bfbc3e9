"""Frozen features, and what can be asked of them without training."""
