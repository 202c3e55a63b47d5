"""Checks against false security: signs that a model looks more robust than it is."""
