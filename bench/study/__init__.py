"""``ironmoe study``: the questions of the paper (arXiv 2210.10253), asked of a ladder of models."""
