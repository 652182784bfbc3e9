"""Which images make up a step, and what they look like."""
