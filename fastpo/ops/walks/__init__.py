"""The loops around the matrix products: tokens and words in tiles, forward and backward."""
