"""The primitives: one file each."""
