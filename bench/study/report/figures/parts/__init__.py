"""What figures are made of: panels, lines of runs and of their means, colours, captions."""
