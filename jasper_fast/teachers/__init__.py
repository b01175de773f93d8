"""Teachers and the cache of their embeddings."""

from jasper_fast._renamed import old_names

__getattr__ = old_names(__name__)
