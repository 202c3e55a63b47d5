"""``ironmoe demo``: train two models of equal compute, attack both, and report."""
