"""Lines and report of a migration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jasper_fast.adaptation.migration.maps import MapTable
from jasper_fast.adaptation.migration.old_index import L2, OldIndex
from jasper_fast.adaptation.migration.pairs import BY_POSITION, Pairs

GOOD, FAIR = 0.9, 0.8  # fractions of the new model's own nDCG. Searches in trials kept 8 points less to 14 more


def pairs_lines(pairs: Pairs, skipped: int) -> list[str]:
    """Describe how documents and rows were matched.

    Args:
        pairs: the usable pairs.
        skipped: number of drawn pairs whose row is not finite or is zero.
    """
    counts = pairs.counts
    how = "in their order" if pairs.key == BY_POSITION else f"by {pairs.key}"
    lines = [f"{len(pairs.texts):,} pairs of a document and a row, matched {how}, of {counts['documents']:,} documents"]
    found = {
        "documents have no row": counts["without a row"],
        "rows have no document": counts["without a document"],
        "documents repeat another one": counts["repeated"],
        "documents are blank": counts["blank"],
        "drawn rows are zero, NaN or infinite": skipped,
    }
    listed = [f"{number:,} {what}" for what, number in found.items() if number]
    return [*lines, *([f"left out: {', '.join(listed)}"] if listed else [])]


def table_lines(table: MapTable, documents: int, questions: int, rows: int, index: OldIndex) -> list[str]:
    """Return the table of maps as Markdown lines, after a line that says what it compares.

    Args:
        table: the scored maps.
        documents: number of held-out documents.
        questions: number of their titles or first sentences.
        rows: number of rows that are ranked.
        index: the old index.
    """
    capped = "" if rows >= index.rows else f" (of {index.rows:,})"
    lines = [
        "",
        f"{documents:,} held-out documents as questions among {rows:,} rows{capped}. The truth is the ten rows nearest "
        "to the old row of the document",
        "",
        "| map | same ten rows | own row among ten | titles nDCG@10 | kept |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in table.rows:
        mark = "**" if row is table.best else ""
        answer = "–" if row.answer is None else f"{100 * row.answer:.1f}"
        kept = "–" if row.kept is None else f"{row.kept:.1%}"
        cells = f"{row.overlap:.1%} ± {row.error:.1%} | {row.own_row:.0%} | {answer} | {kept}"
        lines.append(f"| {mark}{row.name}{mark} | {cells} |")
    lines.append(f"| chance | {table.chance:.1%} | | | |")
    if table.own is not None:
        lines += [
            "",
            f"titles nDCG@10: titles or first sentences of {questions:,} held-out documents find their document among "
            f"the rows. kept: the same among the pairs only, as a fraction of the new model's {100 * table.own:.1f} in "
            "its own space",
        ]
    return lines


def card_scores(table: MapTable) -> list[dict[str, float | str | None]]:
    """Return the rows of the model card's table, with the names of :func:`table_lines`.

    Args:
        table: the scored maps.
    """
    return [
        {
            "map": row.name,
            "same ten rows": row.overlap,
            "own row among ten": row.own_row,
            "titles nDCG@10": row.answer,
            "kept": row.kept,
        }
        for row in table.rows
    ]


def advice(table: MapTable, fitted: int, width: int, index: OldIndex) -> list[str]:
    """Say what to expect of the migrated questions, and what more pairs would change.

    Args:
        table: the scored maps.
        fitted: number of pairs that the maps were fitted to.
        width: h, width of the new model's embeddings.
        index: the old index.
    """
    kept, best = table.best.kept, table.best
    if kept is None:
        lines = [
            f"map: {best.name}. It finds {best.overlap:.0%} of the old ten nearest rows. No document has a title or "
            "three sentences, so the quality of questions is not known. --columns title,text may give titles"
        ]
    else:
        verdict = (
            "the old index can stay"
            if kept >= GOOD
            else "the old index can stay for a while"
            if kept >= FAIR
            else "better embed the documents again with the new model"
        )
        lines = [f"map: {best.name}. Questions keep {kept:.1%} of the new model's own nDCG@10 here: {verdict}"]
    if fitted < 2 * width:
        lines.append(
            f"note: {fitted:,} pairs are few for {width:,} dimensions. In a benchmark with 384 dimensions, 200 pairs "
            "kept 74 to 87 % of the new model's own nDCG@10, 400 kept 85 to 97 %, and 1,000 kept 90 to 100 %"
        )
    if index.codes == "bits":
        lines.append("note: the table compares float questions with the bits. Questions rounded to bits keep less")
    return ["", *lines]


def usage(model: Path, index: OldIndex) -> list[str]:
    """Return lines that show how to ask the old index with the migrated model.

    Args:
        model: folder of the migrated model.
        index: the old index.
    """
    lines = [f"model: {model}", "Encode questions with it, and search the old index as before:", ""]
    if index.kind.startswith("text index"):
        return [*lines, f"    jasper-fast search ask {index.name} --model {model}"]
    scaled = ["    # multiply the embeddings by the length in the note above"] if index.metric == L2 else []
    return [
        *lines,
        "    from sentence_transformers import SentenceTransformer",
        f'    embeddings = SentenceTransformer("{model}").encode_query(questions)  # (n, {index.width}), unit length',
        *scaled,
    ]


def render(name: str, lines: Sequence[str], use: Sequence[str]) -> str:
    """Return report.md.

    Args:
        name: name of the migration.
        lines: what was printed before the model was written.
        use: lines on using it.
    """
    body = [line if not line or line.startswith("|") else f"{line}\n" for line in lines]
    return "\n".join([f"# {name}", "", *body, "", "## Use", "", *use, ""])
