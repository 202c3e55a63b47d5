"""What the runs of a study look like: one figure in one file, registered in ``table.py``."""
