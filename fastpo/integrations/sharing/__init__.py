"""The backbone of a transformers model on packed rows: every prompt once, no padding."""
