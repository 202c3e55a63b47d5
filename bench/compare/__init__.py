"""What finished runs of ``ironmoe attack`` say together: ``ironmoe compare``, ``ironmoe table``."""
