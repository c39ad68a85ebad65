"""Numbers that trainers log, gathered and read once per log."""
