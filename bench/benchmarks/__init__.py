"""``ironmoe bench``: what is measured, and beside what."""
