"""``ironmoe bench kernels``: each operation by itself."""
