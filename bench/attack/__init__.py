"""``ironmoe attack``."""
