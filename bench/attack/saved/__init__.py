"""What ``ironmoe attack`` writes beside its report: rows, tables, and the images that it found."""
