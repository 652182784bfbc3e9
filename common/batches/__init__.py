"""Images of a step: which ones, and what they look like."""
