"""What both stages need: data, models, positions, training loop, checkpoints."""
