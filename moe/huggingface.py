"""Hugging Face models on ironmoe's experts, by the name under which users import it."""

from ironmoe.moe.adapters.huggingface import NAME, patch, register, unpatch

__all__ = ["NAME", "patch", "register", "unpatch"]
