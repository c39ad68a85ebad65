"""Row kernels over the tiles of two heads, one module per backend."""
