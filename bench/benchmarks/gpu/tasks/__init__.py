"""What ``make gpu`` does, one task a file."""
