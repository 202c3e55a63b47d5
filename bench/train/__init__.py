"""``ironmoe train``: adversarial training of any model on any data."""
