"""Commands of ``ironmoe bench`` that measure nothing: limits, and rows that are read again."""
