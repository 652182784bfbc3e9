"""Files that are written to disk while something trains, and read back."""
