"""``ironmoe runs``: what lies in a folder of runs, finished or not."""
