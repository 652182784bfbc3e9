"""Is the answer in the question? The parts of the audit."""
