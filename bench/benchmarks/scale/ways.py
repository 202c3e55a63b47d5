"""The ways to have a layer with many experts on several GPUs."""

EP = "EP"  # each rank holds E / ranks experts, and rows travel
FSDP2 = "FSDP2"  # each rank holds a part of every weight, and weights travel
REPLICAS = "replicas"  # each rank holds all experts, and only weight gradients travel
WAYS = (EP, FSDP2, REPLICAS)
