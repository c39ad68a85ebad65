"""What a backend is, one module each: row kernels over a tile of products."""
