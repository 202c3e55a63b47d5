"""``ironmoe doctor``."""
