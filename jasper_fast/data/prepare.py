"""Prepare the texts of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jasper_fast.config.run import Config
from jasper_fast.data.augment import sentences
from jasper_fast.data.text import normal_form
from jasper_fast.data.text_dataset import BuiltTexts, build_all_texts

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class PreparedTexts(BuiltTexts):
    """The texts of a run, and what its evaluation sets share with them.

    Args:
        transductive: names of the evaluation sets that share a text with the training texts. Normally only
            ``transductive`` sets do.
    """

    transductive: list[str]


def prepare_texts(config: Config) -> PreparedTexts:
    """Build the texts of a run, without its evaluation texts and the captions of its held-out images.

    Raises:
        JasperError: a text source, an evaluation set or an image source cannot be used.
    """
    from jasper_fast.data.eval_loaders import load_evals
    from jasper_fast.data.image_dataset import prepare_images

    evalsets = load_evals(config.evaluate)
    forms = {evalset.name: {normal_form(t) for t in evalset.texts()} for evalset in evalsets}
    excluded = frozenset(normal_form(t) for evalset in evalsets for t in evalset.held_out_texts())
    if config.images is not None:
        _, held_out = prepare_images(config)
        excluded |= {normal_form(caption) for captions in held_out.captions() for caption in captions}
    built = build_all_texts(config.data, config.data.seed, excluded)
    evaluated = excluded.union(*forms.values())
    shared: set[str] = set()
    if evaluated:
        shared = {form for text in _column(built.texts, "text") if (form := normal_form(text)) in evaluated}
    transductive = [name for name, own_forms in forms.items() if not own_forms.isdisjoint(shared)]
    return PreparedTexts(built.texts, built.held_out, built.counts, transductive)


def count_trained_pieces(held_out: Iterable[str], texts: Dataset, longest: int) -> int:
    """Count the held-out texts that contain a training text as a piece.

    Only whole texts are excluded from training. Two documents can still share a passage, such as an example.

    Args:
        held_out: the held-out texts.
        texts: the training texts, with a column ``text``.
        longest: the maximum number of sentences in a piece.
    """
    pieces: dict[str, set[int]] = {}
    for number, text in enumerate(held_out):
        spans = sentences(text)
        for first in range(len(spans)):
            for _, end in spans[first : first + longest]:
                pieces.setdefault(normal_form(text[spans[first][0] : end]), set()).add(number)
    trained = (normal_form(text) for text in _column(texts, "text"))
    return len(set[int]().union(*(pieces[form] for form in trained if form in pieces)))


def _column(texts: Dataset, column: str) -> Iterator[str]:
    for batch in texts.select_columns([column]).with_format("arrow").iter(10_000):
        yield from batch.column(column).to_pylist()
