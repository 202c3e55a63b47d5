"""Rows of tokens between processes. It knows tensors and process groups, and no module.

To read: ``expert_parallel`` (what a layer calls), ``agreement`` (what ranks tell each other first),
``travel`` (rows there and back, with gradients), ``bounded`` (the same without waiting for the
device), ``replicated`` (every rank has all tokens), ``sums`` (over ranks, for losses),
``local_part`` (a rank's part of a weight), ``in_step`` (rows of a batch that every rank has),
``same_draws`` (their random numbers), ``errors`` (which rank is missing), ``traffic`` (what was
sent), ``eager`` (what torch.compile leaves out).
"""
