"""What a backbone looks at, what its answer rests on, and what its layers know."""
