"""Runs side by side: reports of evaluations in, rows and differences with intervals out, as words and as a page."""
