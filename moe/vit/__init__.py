"""Vision transformers with and without experts."""
