"""A promise of logits."""
