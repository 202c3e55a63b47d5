"""Models by name, from wherever they were made, as classifiers of pixels in [0, 1].

Read in this order: ``loaded`` (what comes out), ``classifier`` (the module around somebody else's
model) and ``outputs`` (its logits), ``registry`` (which kinds there are), ``kinds/`` (a file each),
``overrides`` (``--resize`` and its like), ``load`` (from a name to a model).
"""
