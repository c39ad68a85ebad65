"""`fastpo demo`: train a small model on preference pairs with and without the patch."""
