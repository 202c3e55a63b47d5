"""What watches a training: losses that are not finite, routers that collapse, single-step attacks
that the model learns to answer without becoming robust."""
