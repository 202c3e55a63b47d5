"""Every kernel compiled for GPUs that are not here."""
