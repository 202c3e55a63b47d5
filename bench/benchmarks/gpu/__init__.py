"""Everything that is tested and measured on a GPU, in one run: ``python -m
ironmoe.bench.benchmarks.gpu``."""
