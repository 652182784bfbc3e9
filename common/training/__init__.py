"""The loop that trains a backbone, and what it needs."""
