"""The comparison of two models as text."""

from __future__ import annotations

from jasper_fast.drift.comparison import Comparison


def report_text(comparison: Comparison) -> str:
    """Return a comparison as text. Its last line is the verdict."""
    figures, shown = comparison.figures, "–"
    cells = [
        ("", "A", "B"),
        ("width", *map(str, figures.widths)),
        ("mean length of a vector", *(f"{size:.4f}" for size in figures.sizes)),
        ("seconds a text", *(shown if second is None else f"{second:.4f}" for second in comparison.seconds)),
    ]
    lines = [f"{letter}  {side.name} ({side.kind})" for letter, side in zip("AB", comparison.sides, strict=True)]
    lines += [f"{label:<24}{a:>10}{b:>10}".rstrip() for label, a, b in cells]
    both = [
        ("texts", str(comparison.texts)),
        ("cosine, mean", f"{figures.cosine_mean:.6f}"),
        ("cosine, smallest", f"{figures.cosine_min:.6f}"),
        ("same nearest neighbour", f"{100 * figures.same_nearest:.1f} %"),
        ("order of neighbours", f"{figures.order:.4f} (rank correlation of all pairs)"),
    ]
    lines += [f"{label:<24}{value}" for label, value in both]
    if figures.widths[0] != figures.widths[1]:
        lines.append(f"cosines are those of the first {min(figures.widths)} numbers")
    lines += [f"declared settings that differ: {line}" for line in comparison.declared]
    for finding in comparison.findings:
        accepted = " (accepted)" if finding.kind in comparison.accepted else ""
        lines.append(f"found: {finding.kind}{accepted}: {finding.text}{_after(finding.cosine_min)}. Fix: {finding.fix}")
    lines += [f"note: {note}" for note in comparison.notes]
    return "\n".join([*lines, verdict(comparison)])


def verdict(comparison: Comparison) -> str:
    """Return the result in one sentence."""
    counted = [finding for finding in comparison.findings if finding.kind not in comparison.accepted]
    if not counted:
        accepted = ", ".join(dict.fromkeys(finding.kind for finding in comparison.findings))
        return f"same: B gives the embeddings of A{f', apart from what you accepted ({accepted})' if accepted else ''}"
    partly = "" if all(finding.exact for finding in counted) else ", which explains most of the difference but not all"
    return f"different: {'; '.join(finding.text for finding in counted)}{partly}"


def _after(cosine_min: float | None) -> str:
    return "" if cosine_min is None else f" (with this matched, the smallest cosine is {cosine_min:.6f})"
