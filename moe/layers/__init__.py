"""The layers: MoE, the dense MLP, SoftMoE, and MLPs of other libraries as they are read."""
