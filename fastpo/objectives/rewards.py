"""Reward models: preferences between scalar or vector heads. All return [B] unless said."""
