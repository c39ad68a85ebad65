"""Policy gradient: clipped and weighted ratios of [N, T] log-probabilities. All return [N]."""
