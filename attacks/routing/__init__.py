"""Attacks that know routing: what the search may do to it, and attacks through it.

``modes`` lists the routing modes; ``auxiliary_loss`` and ``divergence`` are modes that add to the
loss. ``batch_mates`` attacks an image through its neighbours. ``statistics`` compares the routing
of images before and after an attack. No file here knows an attack's class.
"""
