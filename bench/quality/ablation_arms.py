"""Arms and questions of the ablation. Each arm is the last stage of a run, on an encoder that is distilled already."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jasper_fast.config.stage import StageConfig

BATCH, RATE = 512, 2e-3


@dataclass(frozen=True)
class Arm:
    """One way to train the narrow heads.

    Args:
        group: question that the arm answers.
        name: unique name.
        stage: differences from the stage of `settings`.
        heads: "prefix" makes every width the beginning of the widest head. "widest" trains only that head.
        teachers: "two" concatenates the embeddings of a lexical teacher to the model's. "own" is the student's
            full-width embedding.
        start: "principal" initializes narrow heads to the principal axes of the full width.
        codes: True also scores int8 and bits.
        searched: True adds the documents of the retrieval sets to the texts, without queries.
    """

    group: str
    name: str
    stage: dict[str, Any] = field(default_factory=dict)
    heads: Literal["independent", "prefix", "widest"] = "independent"
    teachers: Literal["one", "two", "own"] = "one"
    start: Literal["random", "principal"] = "random"
    codes: bool = False
    searched: bool = False

    def settings(self, widest: int, narrow: list[int]) -> StageConfig:
        """Return the stage, at a learning rate that grows with the root of the batch.

        The widest head trains only if prefix heads are cut from it, or if it is alone.
        """
        heads = {"independent": narrow, "prefix": [widest, *narrow], "widest": [widest]}[self.heads]
        batch = self.stage.get("batch_size", BATCH)
        rate = RATE * min(4.0, max(0.5, (batch / BATCH) ** 0.5))
        fixed: dict[str, Any] = {
            "name": "heads",
            "train": ["heads.*"],
            "heads": heads,
            "steps": 1,  # time or texts end it
            "lr": rate,
            "batch_size": batch,
            "weights": _weights(cosine=10.0),  # of the widest head
        }
        settings = {**fixed, **self.stage}
        if isinstance(settings.get("temperature"), dict):
            settings["temperature"] = {w: t for w, t in settings["temperature"].items() if w in heads}
        return StageConfig(**settings)


def _weights(**given: float) -> dict[str, float]:
    return {"cosine": 0.0, "similarity": 0.0, "relative_similarity": 0.0, "neighbourhood": 0.0, **given}


SIMILARITY = {"narrow_weights": _weights(similarity=200.0)}
RELATIVE = {"narrow_weights": _weights(relative_similarity=20.0)}
PAPER = {"narrow_weights": _weights(similarity=200.0, relative_similarity=20.0)}  # its cosine needs equal widths
NEIGHBOURHOOD = {"narrow_weights": _weights(neighbourhood=1.0)}
BOTH = {"narrow_weights": _weights(similarity=50.0, neighbourhood=1.0)}
ALL = {"narrow_weights": _weights(similarity=50.0, relative_similarity=20.0, neighbourhood=1.0)}


def mined(k: int = 8, share: float = 0.0) -> dict[str, Any]:
    """Return the settings of batches of groups of k neighbours, with a fraction of random texts."""
    return {"batches": "neighbours", "neighbours": k, "random_share": share}


BEST = "neighbourhood, mined"
RECIPE = "recipe: groups of 4, from principal axes"  # minilm-narrow
PAPERS = "paper's, random"
RECIPE_OWN = f"{RECIPE}, own vector"
RECIPE_SEARCHED, PAPERS_SEARCHED = f"{RECIPE}, searched texts too", f"{PAPERS}, searched texts too"
TUNED = mined(4) | {"temperature": {128: 0.1, 64: 0.1, 32: 0.05}, "lr": 1e-3}
FULL_WIDTH_BITS = "full width, trained for bits"
ENCODER_RECIPE, ENCODER_PAPERS = "encoder: cosine", "encoder: paper's three"

ARMS = [
    Arm("losses", "similarity, random", SIMILARITY),
    Arm("losses", "relative similarity, random", RELATIVE),
    Arm("losses", PAPERS, PAPER, codes=True),
    Arm("losses", "neighbourhood, random", NEIGHBOURHOOD),
    Arm("losses", "similarity, mined", SIMILARITY | mined()),
    Arm("losses", "relative similarity, mined", RELATIVE | mined()),
    Arm("losses", "paper's, mined", PAPER | mined()),
    Arm("losses", BEST, NEIGHBOURHOOD | mined(), codes=True),
    Arm("losses", "neighbourhood and similarity, mined", BOTH | mined()),
    Arm("losses", "all, mined", ALL | mined()),
    Arm("mining", "groups of 2", NEIGHBOURHOOD | mined(2)),
    Arm("mining", "groups of 4", NEIGHBOURHOOD | mined(4)),
    Arm("mining", "groups of 16", NEIGHBOURHOOD | mined(16)),
    Arm("mining", "groups of 32", NEIGHBOURHOOD | mined(32)),
    Arm("mining", "groups of 8, a quarter random", NEIGHBOURHOOD | mined(8, 0.25)),
    Arm("mining", "groups of 8, half random", NEIGHBOURHOOD | mined(8, 0.5)),
    Arm("temperature", "temperature 0.02", NEIGHBOURHOOD | mined() | {"temperature": 0.02}),
    Arm("temperature", "temperature 0.1", NEIGHBOURHOOD | mined() | {"temperature": 0.1}),
    Arm(
        "temperature",
        "temperature 0.05, 0.07 at 64, 0.1 at 32",
        NEIGHBOURHOOD | mined() | {"temperature": {64: 0.07, 32: 0.1}},
    ),
    *(
        Arm("batch", f"{name}, {batch}", loss | {"batch_size": batch})
        for name, loss, sizes in (
            ("neighbourhood, mined", NEIGHBOURHOOD | mined(), (128, 2048, 16_384)),
            ("neighbourhood, random", NEIGHBOURHOOD, (128, 2048, 16_384)),
            ("similarity, random", SIMILARITY, (128, 2048, 16_384)),
            ("paper's, random", PAPER, (128, 2048, 16_384)),
        )
        for batch in sizes
    ),
    Arm("target", "neighbourhood, mined, own vector", NEIGHBOURHOOD | mined(), teachers="own"),
    Arm("target", RECIPE_OWN, NEIGHBOURHOOD | TUNED, teachers="own", start="principal", codes=True),
    Arm("target", "paper's, random, own vector", PAPER, teachers="own"),
    Arm("heads", "neighbourhood, mined, prefix", NEIGHBOURHOOD | mined(), heads="prefix"),
    Arm("heads", "paper's, random, prefix", PAPER, heads="prefix"),
    Arm("start", "neighbourhood, mined, from principal axes", NEIGHBOURHOOD | mined(), start="principal"),
    Arm("start", RECIPE, NEIGHBOURHOOD | TUNED, start="principal", codes=True),
    Arm("start", "paper's, random, from principal axes", PAPER, start="principal", codes=True),
    Arm("searched", RECIPE_SEARCHED, NEIGHBOURHOOD | TUNED, start="principal", codes=True, searched=True),
    Arm("searched", PAPERS_SEARCHED, PAPER, searched=True),
    Arm("searched", "paper's, from principal axes, searched texts too", PAPER, start="principal", searched=True),
    Arm("teachers", "neighbourhood, mined, two teachers", NEIGHBOURHOOD | mined(), teachers="two"),
    Arm("codes", "trained for bits", NEIGHBOURHOOD | mined() | {"codes": ["ubinary"]}, codes=True),
    Arm(
        "codes",
        "trained for bits, from principal axes",
        NEIGHBOURHOOD | mined() | {"codes": ["ubinary"]},
        start="principal",
        codes=True,
    ),
    Arm("codes", FULL_WIDTH_BITS, NEIGHBOURHOOD | mined() | {"codes": ["ubinary"]}, heads="widest", codes=True),
    Arm("codes", "trained for int8 and bits", NEIGHBOURHOOD | mined() | {"codes": ["int8", "ubinary"]}, codes=True),
]

# At full width the encoder also trains: weights of the recipe's second stage.
ENCODER_ARMS = {
    ENCODER_RECIPE: _weights(cosine=10.0),
    ENCODER_PAPERS: _weights(cosine=10.0, similarity=200.0, relative_similarity=20.0),
    "encoder: similarity": _weights(similarity=200.0),
    "encoder: cosine and neighbourhood": _weights(cosine=10.0, neighbourhood=1.0),
}

# Question, the arm expected to win, and the arm to compare it with.
STATEMENTS = [
    ("Which losses", BEST, PAPERS),
    ("Which losses, both on mined batches", BEST, "paper's, mined"),
    ("Is the relative similarity loss worth having", PAPERS, "similarity, random"),
    ("Does the similarity loss add to the neighbourhood loss", "neighbourhood and similarity, mined", BEST),
    ("Do all losses together", "all, mined", BEST),
    ("Which batches", BEST, "neighbourhood, random"),
    ("Do mined batches help the paper's losses", "paper's, mined", PAPERS),
    ("Should part of a mined batch be random", "groups of 8, a quarter random", BEST),
    ("Smaller batches", "neighbourhood, mined, 128", BEST),
    ("Larger batches", "neighbourhood, mined, 2048", BEST),
    ("Very large batches in place of mining", "neighbourhood, random, 16384", BEST),
    ("The paper's losses with larger batches", "paper's, random, 2048", PAPERS),
    ("The paper's losses with very large batches", "paper's, random, 16384", PAPERS),
    ("Which target: the own vector", "neighbourhood, mined, own vector", BEST),
    ("Which heads: prefixes of the widest", "neighbourhood, mined, prefix", BEST),
    ("Beginning at principal axes", "neighbourhood, mined, from principal axes", BEST),
    ("The recipe against the paper's losses", RECIPE, PAPERS),
    ("The recipe taught by the own vector", RECIPE_OWN, RECIPE),
    ("The recipe taught by the own vector against the paper's losses", RECIPE_OWN, PAPERS),
    ("Both from principal axes", RECIPE, "paper's, random, from principal axes"),
    ("Are the documents that will be searched worth having among the texts", RECIPE_SEARCHED, RECIPE),
    ("The recipe against the paper's losses, both with them", RECIPE_SEARCHED, PAPERS_SEARCHED),
    ("A lexical second teacher, concatenated", "neighbourhood, mined, two teachers", BEST),
    ("Training for codes, judged by the floats", "trained for int8 and bits", BEST),
    ("At full width: the paper's three losses", ENCODER_PAPERS, ENCODER_RECIPE),
    ("At full width: the neighbourhood loss beside the cosine", "encoder: cosine and neighbourhood", ENCODER_RECIPE),
]
