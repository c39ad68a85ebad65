"""Tables of documentation pages, from reports."""
