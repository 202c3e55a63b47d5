"""Rows of tokens between processes. It knows tensors and process groups, and no module.

To read: ``expert_parallel`` (what a layer calls), ``agreement`` (what ranks tell each other first),
``travel`` (rows there and back, with gradients), ``bounded`` (the same without waiting for the
device), ``replicated`` (every rank has all tokens), ``local_part`` (a rank's part of a weight),
``errors`` (which rank is missing), ``traffic`` (what was sent).
"""
