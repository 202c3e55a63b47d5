"""Runs the PTX that Triton emits, in numpy: programs of a launch in lockstep, and checks what a GPU
would not tell.
"""
