"""Weights of experts in host memory, those in use on the device that computes."""
