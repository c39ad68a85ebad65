"""Distillation and full-vocabulary terms: divergences of [P, V] logits. Most return [P]."""
