"""``ironmoe attack``: any model, any data, any attacks, and a report."""
