"""``ironmoe demo``."""
