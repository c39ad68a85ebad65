"""Rows of tokens that begin alike, as one packed row in which every token stands once."""
