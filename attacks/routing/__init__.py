"""Attacks that know routing."""
