"""Section `rank` of a stage: queries, their candidate documents, and the losses that rank them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from jasper_fast.config.types import NotNegative, Positive, PositiveInt, Section

MADE = "made"  # queries that are made from the training documents
TEACHER, GRADES = "teacher", "grades"  # targets that are not the name of a cross-encoder
TEACHER_TEMPERATURE = {TEACHER: 0.05}  # by targets, if none is given
LOGIT_TEMPERATURE = 1.0  # of a cross-encoder's logits and of grades


class RankStageConfig(Section):
    """Settings of a stage that ranks documents for queries.

    A batch has ``batch_size`` queries and all their candidates. The losses in ``weights`` are for all of these texts.
    """

    # made: from the training documents (titles, first sentences, keywords, questions); or a file with the columns
    # `query` and, if you have them, `candidates` and `grades`
    queries: Annotated[str, Field(min_length=1)] = MADE
    limit: PositiveInt | None = None  # largest number of queries, drawn by the seed
    # documents per query, of which the source document is one; the rest are the teacher's nearest
    candidates: Annotated[int, Field(ge=2, le=10**4, strict=True)] = 16
    # scores to learn: teacher (its cosines), grades (of the file), or a cross-encoder: `bundle:NAME`, or a folder
    targets: Annotated[str, Field(min_length=1)] = TEACHER
    listwise: NotNegative = 1.0  # weight of the KL divergence between the distributions over a query's candidates
    contrastive: NotNegative = 0.0  # weight of InfoNCE: the query's document among all documents of the batch
    # documents whose teacher score exceeds that of the query's document minus this are no wrong answers in InfoNCE
    margin: NotNegative = 0.0
    temperature: Positive = 0.05  # temperature of the student's cosines in both losses
    # temperature of the scores in the listwise loss; null: 0.05 for teacher, 1 for a cross-encoder and grades
    teacher_temperature: Positive | None = None
    max_length: PositiveInt = 256  # tokens of a query and a document that a cross-encoder reads
    trust_remote_code: bool = False  # permission to run code that comes with the cross-encoder

    @model_validator(mode="after")
    def _check_targets(self) -> RankStageConfig:
        if not self.listwise and not self.contrastive:
            raise ValueError(
                "listwise and contrastive both have weight 0, so queries would not matter. Fix: give one a weight"
            )
        if self.targets == GRADES and self.queries == MADE:
            raise ValueError(
                "targets: grades, but made queries have no grades. Fix: set queries to a file with grades, or targets "
                "to teacher"
            )
        return self

    @property
    def cross_encoder(self) -> str | None:
        """The cross-encoder that scores the candidates. None: the teacher or the file does."""
        return None if self.targets in (TEACHER, GRADES) else self.targets

    @property
    def score_temperature(self) -> float:
        """The temperature of the scores, with the default filled in."""
        if self.teacher_temperature is not None:
            return self.teacher_temperature
        return TEACHER_TEMPERATURE.get(self.targets, LOGIT_TEMPERATURE)
