"""Routing in a whole model: seen, replaced and measured."""
