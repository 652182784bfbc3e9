"""Training a backbone further with labels: options, augmentation, the steps and their checkpoints."""
