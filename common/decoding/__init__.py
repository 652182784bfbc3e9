"""Encoded bytes to uint8 pixels."""
