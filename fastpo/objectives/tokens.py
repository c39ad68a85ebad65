"""Pairs, token level: objectives of [B, T] log-probabilities and their masks. All return [B]."""
