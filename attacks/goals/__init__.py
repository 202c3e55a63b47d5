"""Goals: what a success is and what a search raises, one class in one file each."""
