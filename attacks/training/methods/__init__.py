"""The training methods, one in each file."""
