"""The report of ``ironmoe train``: curves over epochs, the final figures, and what they mean."""
