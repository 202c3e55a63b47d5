"""The report of ``ironmoe study``: one page with the verdicts, their numbers and the figures."""
