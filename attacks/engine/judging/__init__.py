"""Predictions that count: how many passes they take, who makes them, and what is said where they
are not finite."""
