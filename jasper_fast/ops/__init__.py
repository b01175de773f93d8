"""Operations of losses and search: the compiled extension, dispatch, normalization, row blocks and cost."""

from jasper_fast._renamed import old_names

__getattr__ = old_names(__name__)
