"""What the jobs of a run on a GPU do, one task a file."""
