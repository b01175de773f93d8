"""Advice at the end of a run, from its label-free scores and losses. It claims only what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jasper_fast.evaluation.label_free import NEIGHBOURS
from jasper_fast.evaluation.score import BEFORE, STUDENT, STUDENT_PCA

LOSS = 0.1  # a narrower width is advised if it loses at most this fraction of the widest one's overlap
CERTAIN = 2.0  # standard errors from which a difference counts
FEW = 10**9  # documents, where their number is unknown: no chance level
PCA = " (its main directions, found without training)"
MIN_STEPS = 40  # steps of a stage from which its last tenth says something


def advice(label_free: Mapping[str, Any], trend: Mapping[str, Any] | None = None) -> str:
    """Return one or two sentences about widths, PCA and more training. Empty if nothing was measured.

    Args:
        label_free: the field ``label_free`` of results.json.
        trend: the loss at the end of the main stage, from :func:`loss_trend`.
    """
    rows = label_free.get("rows", [])
    heads = {r["width"]: r["overlap"] for r in rows if r["model"] == STUDENT and "precision" not in r}
    if not heads:
        return ""
    compared = {(d["width"], d["to"]): (d["difference"], d["error"]) for d in label_free["differences"]}
    chance = min(1.0, NEIGHBOURS / max(1, label_free.get("documents", FEW) - 1))
    sentences = [_width_sentence(heads, compared, chance), _training_sentence(heads, compared, trend)]
    return " ".join(sentence for sentence in sentences if sentence)


def loss_trend(steps: Sequence[Mapping[str, Any]], stage: str) -> dict[str, Any] | None:
    """Compare the losses of a stage's last tenth with those of the tenth before.

    Args:
        steps: step lines of log.jsonl, in order.
        stage: name of the stage.

    Returns:
        ``stage``, ``fall`` (a fraction of the earlier loss, positive if the loss fell) and its standard ``error``.
        Fewer than 40 steps say nothing about that: then it is ``stage`` and the number of ``steps``. None if the stage
        took no step or its loss is not positive.
    """
    losses = np.array([line["loss"] for line in steps if line["stage"] == stage], dtype=np.float64)
    tenth = len(losses) // 10
    if 0 < len(losses) < MIN_STEPS:
        return {"stage": stage, "steps": len(losses)}
    if not tenth:
        return None
    earlier, last = losses[-2 * tenth : -tenth], losses[-tenth:]
    if not earlier.mean() > 0:
        return None
    error = np.sqrt((earlier.var(ddof=1) + last.var(ddof=1)) / tenth)
    fall = (earlier.mean() - last.mean()) / earlier.mean()
    return {"stage": stage, "fall": float(fall), "error": float(error / earlier.mean())}


def _width_sentence(
    heads: Mapping[int, float], compared: Mapping[tuple[int, str], tuple[float, float]], chance: float
) -> str:
    """Say down to which width the overlap of the widest is kept, and what narrower ones lose.

    Among few documents, random neighbours are often the teacher's. Only overlap above that chance counts as kept.
    """
    widest, *narrow = sorted(heads, reverse=True)
    if not narrow:
        return ""
    chance = chance if chance >= LOSS else 0.0
    least = chance + (1 - LOSS) * (heads[widest] - chance)
    if heads[widest] <= chance:
        return f"No width keeps more neighbours than chance ({100 * chance:.0f} %)."
    lost = next((at for at, width in enumerate(narrow) if heads[width] < least), len(narrow))
    changes = {width: _points(*compared[width, "widest"]) for width in narrow}
    parts = []
    if lost:
        kept = narrow[lost - 1]
        parts.append(f"width {kept} keeps the neighbours of width {widest} within a tenth ({changes[kept]})")
    if listed := ", ".join(f"{width}: {changes[width]}" for width in narrow[lost:]):
        parts.append(f"narrower widths lose more than a tenth ({listed})")
    if chance:
        parts.append(f"among so few documents, chance alone gives {100 * chance:.0f} %, which is subtracted here")
    return _sentence(parts)


def _training_sentence(
    heads: Mapping[int, float],
    compared: Mapping[tuple[int, str], tuple[float, float]],
    trend: Mapping[str, Any] | None,
) -> str:
    """Compare trained narrow heads with PCA of the widest, and say what is known about more training."""
    versus = {width: values for (width, to), values in compared.items() if to == STUDENT_PCA}
    better = [width for width, (difference, error) in versus.items() if difference > CERTAIN * error]
    worse = [width for width, (difference, error) in versus.items() if -difference > CERTAIN * error]
    equal = [width for width in versus if width not in better and width not in worse]
    phrases = (
        ("trained heads beat", better),
        ("no difference was measured to", equal),
        ("trained heads lose to", worse),
    )
    parts = [f"at {_list(widths)}, {phrase} PCA of width {max(heads)}" for phrase, widths in phrases if widths]
    if parts:
        parts[0] += PCA
    gain, error = compared.get((max(heads), BEFORE), (None, 0.0))
    nothing_gained = gain is not None and gain <= CERTAIN * error
    if gain is not None and nothing_gained:
        parts.append(f"training gained nothing measurable ({_points(gain, error)})")
    if trend is not None and "steps" in trend:
        steps = f"{trend['steps']} step{'s' * (trend['steps'] > 1)}"
        parts.append(f"stage {trend['stage']!r} took only {steps}, so give it more minutes or steps")
    elif trend is not None and not nothing_gained and trend["fall"] > CERTAIN * trend["error"]:
        parts.append(
            f"the loss of stage {trend['stage']!r} still fell by {100 * trend['fall']:.1f} % in its last tenth, so "
            "more steps may help"
        )
    return _sentence(parts)


def _sentence(parts: Sequence[str]) -> str:
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _points(difference: float, error: float) -> str:
    return f"{100 * difference:+.1f} ± {100 * error:.1f} points".replace("-", "−")


def _list(widths: Sequence[int]) -> str:
    *others, last = [str(width) for width in sorted(widths, reverse=True)]
    return f"{', '.join(others)} and {last}" if others else last
