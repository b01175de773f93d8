"""The student, stock models, and their folders."""

from jasper_fast._renamed import old_names

__getattr__ = old_names(__name__)
