"""Files of rows that are read again: compared with others, and drawn."""
