"""A trained backbone in the form that other programs read."""
