"""What losses and search share below the kernels: the compiled extension, dispatch, normalization and row blocks."""

from jasper_fast._renamed import old_names

__getattr__ = old_names(__name__)
