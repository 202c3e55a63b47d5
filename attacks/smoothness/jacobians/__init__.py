"""Derivatives of a model at given images: of its logits with respect to pixels, and of a layer's
tokens with respect to the tokens that it got; what of them comes through experts, and what through
gates."""
