"""One perturbation for all images: how it is found, and what it does to other images."""
