"""Rows of a benchmark: the file that keeps them, where they come from, and the time left."""
