"""Heads that lie in several places: gathered for a call, or scored shard by shard."""
