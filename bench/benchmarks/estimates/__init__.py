"""``ironmoe bench roofline --estimate``: what a static model expects of the compiled kernels."""
