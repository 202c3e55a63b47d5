"""How the expert uses autograd: gradients on demand, H computed again, torch.func."""
