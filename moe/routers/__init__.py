"""Routers, capacities and their auxiliary losses: which experts a token goes to."""
