"""``ironmoe train``: adversarial training of a model from anywhere, its report, and the attack on
the weights that were chosen."""
