"""What frozen features are worth: linear heads by the protocols of the field, regression, and few labels."""
