"""Products of rows with a few words of their own, and their backward."""
