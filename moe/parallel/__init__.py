"""Models shared out over processes: their experts, gradients and checkpoints."""
