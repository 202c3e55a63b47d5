"""Programs: the ``ironmoe`` command, its demo, reports and benchmarks."""
