"""From contrasts to verdicts: one set of rules for all claims."""
