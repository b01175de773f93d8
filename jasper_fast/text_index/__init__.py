"""An index of texts or images on disk, together with the model that embeds its questions."""

from jasper_fast.text_index.build import build
from jasper_fast.text_index.files import check_replace
from jasper_fast.text_index.index import Hit, TextIndex
from jasper_fast.text_index.update import add, remove

__all__ = ["Hit", "TextIndex", "add", "build", "check_replace", "remove"]
