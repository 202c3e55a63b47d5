"""The command line of ``ironmoe``."""
