"""A name that is imported, and not called."""

all_gather = None
