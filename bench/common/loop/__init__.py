"""What the training loops share: the batches of an epoch, the schedules of the learning rate."""
