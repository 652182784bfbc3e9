"""What is written to disk while something trains, and read back."""
