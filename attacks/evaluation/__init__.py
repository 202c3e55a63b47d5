"""A data set in, a robustness report out."""
