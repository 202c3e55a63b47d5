"""``ironmoe bench training``: what a step of adversarial training costs, and what each method
achieves over several seeds."""
