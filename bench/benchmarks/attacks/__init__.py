"""``ironmoe bench attacks``: the same attacks by several libraries, on models trained for it."""
