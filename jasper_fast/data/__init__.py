"""Texts, images and evaluation sets."""

from jasper_fast._renamed import old_names

__getattr__ = old_names(__name__)
