"""The Triton kernels and their launchers. Imported only when a tensor takes them: triton is no
dependency of the CPU path."""
