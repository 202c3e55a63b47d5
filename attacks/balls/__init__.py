"""Norm balls inside the image box, one file a norm."""
