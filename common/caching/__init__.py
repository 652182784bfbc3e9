"""Decoded images kept on disk, so that an epoch decodes nothing."""
