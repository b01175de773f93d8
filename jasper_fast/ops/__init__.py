"""What losses and search share below the kernels: the compiled extension, dispatch, normalization and row blocks."""
