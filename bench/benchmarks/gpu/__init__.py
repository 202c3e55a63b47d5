"""``python -m ironmoe.bench.benchmarks.gpu``: test and measure everything on a GPU in one run.

What is imported here needs only torch and Triton.
"""
