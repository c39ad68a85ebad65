"""Names in foreign modules, replaced and given back."""
