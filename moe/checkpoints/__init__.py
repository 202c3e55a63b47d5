"""Checkpoints of the official V-MoE code, read and written."""
