"""Models on several devices: experts shared out over ranks (``parallelize``), the rest by FSDP2 or
copied; their gradients; their checkpoints; passes in which all ranks look at the same images."""
