"""Groups: objectives of N scored responses in G groups. All return [G]."""
