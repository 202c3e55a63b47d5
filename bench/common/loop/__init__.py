"""What the training loops share: initial weights, the batches of an epoch, learning rates."""
