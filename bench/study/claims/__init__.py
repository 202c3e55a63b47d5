"""The claims of the paper as questions to trained models, and the verdicts in words."""
