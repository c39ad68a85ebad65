"""Log-probabilities over the words that a sampler kept."""
