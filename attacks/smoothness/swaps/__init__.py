"""Changes of an expert: the nearest ones, how many images are near one, and what one does."""
