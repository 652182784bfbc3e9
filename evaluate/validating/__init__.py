"""Validating a classifier: on which images, by which labels, class by class, and in a picture."""
