"""What a whole training step needs, told before training."""
