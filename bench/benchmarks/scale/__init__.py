"""``ironmoe bench scale``: what expert parallelism costs, when it pays and what memory a rank
needs, computed from bytes and FLOPs; and the bytes checked against processes that run."""
