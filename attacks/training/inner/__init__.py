"""The inner attack of adversarial training: a plain loop that perturbs every image."""
