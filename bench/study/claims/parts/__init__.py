"""What claims are made of: units, arms to compare, contrasts, words."""
