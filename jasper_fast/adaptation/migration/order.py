"""Check that rows without ids and texts are in the order of the documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jasper_fast.teachers.reduction import spread_rows
from jasper_fast.teachers.row_order import MIN_ROWS, centred_similarities, fit_of_order, lexical_similarities
from jasper_fast.utils.errors import JasperError

SAMPLE = 1024  # pairs
FIX = "Fix: give an index with ids or texts, or the documents in the order of the rows"


def check_order(name: str, texts: Sequence[str], old: np.ndarray, new: np.ndarray, force: bool) -> str:
    """Compare the rows' similarities with those of the texts and of the new model's embeddings.

    Args:
        name: the old index, for messages.
        texts: n documents, in the order of the source.
        old: (n, d) their rows, if the order is right.
        new: (n, h) the new model's embeddings.
        force: return a warning in place of an error.

    Returns:
        The outcome, as a line.

    Raises:
        JasperError: the rows fit the documents no better than in a random order, everywhere or in a part.
    """
    chosen = spread_rows(len(texts), SAMPLE)
    problem = None
    if len(chosen) < MIN_ROWS:
        problem = f"its order cannot be checked (got {len(chosen)} rows, expected at least {MIN_ROWS})"
    else:
        lexical = lexical_similarities([texts[number] for number in chosen])
        fit = fit_of_order(centred_similarities(old[chosen]), [lexical, centred_similarities(new[chosen])])
        measured = f"rank correlation with the new model's similarities {fit.correlation:.2f} on {len(chosen)} rows"
        if not fit.is_significant:
            problem = f"its rows fit the documents no better than in a random order ({measured})"
        elif fit.block is not None or fit.wrong:
            part = f"about {fit.wrong:.0%}" if fit.block is None else f"{np.ptp(fit.block) / len(chosen):.0%}"
            problem = f"{part} of its rows do not fit the documents ({measured})"
    if problem is None:
        return f"the order of the rows fits the documents ({measured})"
    if force:
        return f"WARNING: {name}: row order? {problem}. It is used as it is, because of --force"
    raise JasperError(f"{name}: row order? {problem}. {FIX}")
