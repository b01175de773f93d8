"""Ranking stages: the student learns the order of candidate documents of queries, next to the teachers' embeddings.

A batch has queries and the distinct documents among their candidates, all encoded in one pass. The batch is the same
for any number of ranks, which divide queries and documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jasper_fast.config.rank import MADE, RankStageConfig
from jasper_fast.config.stage import StageConfig
from jasper_fast.distributed.fsdp import is_sharded
from jasper_fast.distributed.ranks import Ranks
from jasper_fast.models.micro_batches import MicroBatches
from jasper_fast.models.student import Student
from jasper_fast.training.data import Batch, RankInputs
from jasper_fast.training.parameters import text_parameters
from jasper_fast.training.prefetch import batches_of
from jasper_fast.training.rank_queries import RankQueries, ranking_queries
from jasper_fast.training.ranking import Ranking, make_ranking, random_ranking, scorer_identity
from jasper_fast.training.run.checkpoint import Position
from jasper_fast.training.sampler import BatchPlan, random_batches
from jasper_fast.training.stages.base import BaseStage
from jasper_fast.training.stages.losses import RankLoss
from jasper_fast.utils.device import compiles_each_shape
from jasper_fast.utils.errors import Problems

if TYPE_CHECKING:
    from jasper_fast.training.run.run import Run


class RankStage(BaseStage):
    """A stage of queries and their candidate documents.

    Args:
        config: the run's configuration.
        index: the stage's position in it.
        data: the texts. None: only checks that need none are made.
        labels: the teacher embeddings. None: the stage is not trained.
    """

    ranking: Ranking | None = None  # candidates and targets, once they are known
    rehearsed = False  # whether they are random

    @staticmethod
    def trained_names(student: Student, stage: StageConfig) -> list[str]:
        """Return the names of the parameters that the stage trains."""
        return text_parameters(student, stage)

    @property
    def settings(self) -> RankStageConfig:
        """The settings of the ranking."""
        assert self.config.rank is not None
        return self.config.rank

    @cached_property
    def queries(self) -> RankQueries:
        """The queries that batches are drawn from."""
        return ranking_queries(self.run_config, self.index, self.data)

    def source(self) -> tuple[Any, str]:
        """Return the queries, and their unit."""
        return self.queries, "queries"

    def available(self) -> int:
        """Return the number of queries."""
        return len(self.queries)

    def pooled_rows(self, student: Student) -> int:
        """Return 0: also a frozen encoder reads the texts of each batch."""
        return 0

    def problems(self, student: Student, ranks: int) -> list[str]:
        """Return the problems of the stage with a student and a number of ranks, before texts are read."""
        problems, stage, rank = Problems(super().problems(student, ranks)), self.config, self.settings
        stored = [place for place, teacher in enumerate(self.run_config.teachers) if teacher.model is None]
        if rank.queries == MADE and stored:
            problems.append(
                f"stage {stage.name!r}: teachers.{stored[0]} has stored embeddings, and cannot embed queries that are "
                "made. Fix: use a teacher with `model`, or set rank.queries to a file of queries that it has"
            )
        with problems:
            scorer_identity(rank)
        return list(problems)

    def parallel_problems(self, ranks: int) -> list[str]:
        """Return the problems of training the stage on several ranks."""
        problems = super().parallel_problems(ranks)
        if self.run_config.parallel.mode == "fsdp" and ranks > 1 and not self.global_loss:
            problems.append(
                "a ranking stage with parallel.mode: fsdp needs losses.scope: global, so that ranks make equally many "
                "passes. Fix: set it"
            )
        return problems

    def facts(self) -> dict[str, str]:
        """Return the identities of the queries and of the cross-encoder."""
        scorer = scorer_identity(self.settings)
        return {"queries": self.queries.fingerprint, **({} if scorer is None else {"scores": scorer})}

    def lines(self) -> list[str]:
        """Return a line about queries, candidates and scores."""
        rank, documents = self.settings, len(self.queries.documents)
        scores = {"teacher": "the teachers' cosines", "grades": "grades"}.get(rank.targets, rank.targets)
        return [
            f"stage {self.config.name}: {self.queries.line}; up to {min(rank.candidates, documents)} candidates of "
            f"each among {documents:,} documents, scored by {scores} at temperature {rank.score_temperature:g}"
        ]

    def rehearse(self) -> None:
        """Let candidates, scores and embeddings of queries be random."""
        self.rehearsed = True

    def plan(self, run: Run) -> BatchPlan:
        """Return the queries of every step."""
        return random_batches(len(self.queries), self.config.batch_size, *self.seed)

    def pool(self, run: Run, student: Student, plan: BatchPlan) -> None:
        """Embed, mine and score the candidates of the queries that the stage reads."""
        used = np.unique(np.concatenate([plan(step) for step in range(self.config.steps)]))
        if self.rehearsed:
            self.ranking = random_ranking(self.settings, self.queries, self.labels, used)
        else:
            self.ranking = make_ranking(
                run, self.config.name, self.settings, self.queries, self.data.texts, self.labels, used
            )

    def initialize(self, run: Run, student: Student, start: Position) -> None:
        """Set the loss."""
        self.loss = RankLoss(self.config, student.widths[0], run.ranks.group if self.global_loss else None)

    def batches(self, first_step: int) -> Iterator[tuple[int, Batch]]:
        """Yield (step, this rank's batch) from ``first_step`` to the end of the stage."""
        assert self.ranking is not None
        return rank_batches(
            self.config,
            first_step,
            self._plan,
            self.data.texts,
            self.ranking,
            self._student,
            self._ranks,
            self.global_loss,
            compiles_each_shape(self._student.device, self.run_config.precision),
        )


def rank_batches(
    stage: StageConfig,
    first_step: int,
    plan: BatchPlan,
    texts: Any,
    ranking: Ranking,
    student: Student,
    ranks: Ranks,
    across_ranks: bool = True,
    few_shapes: bool = False,
) -> Iterator[tuple[int, Batch]]:
    """Yield (step, this rank's queries and documents) from ``first_step`` to the end of the stage.

    Args:
        stage: the stage's settings.
        first_step: the first step.
        plan: the queries of every step.
        texts: the training texts, a dataset.
        ranking: candidates and targets.
        student: the student, which tokenizes.
        ranks: the ranks that divide a batch.
        across_ranks: whether the losses compare the texts of all ranks. If not, each rank encodes the candidates of its
            own queries.
        few_shapes: whether micro-batches have few different shapes.
    """
    length = stage.max_length or student.max_length

    def prepare(step: int) -> Batch:
        queries = plan(step)
        if not across_ranks:
            queries = queries[ranks.rows(stage.batch_size)]
        rows, inputs = batch_rows(ranking, queries, ranks.world if across_ranks else 1)
        places = np.arange(len(rows))
        if across_ranks:
            start = sum(inputs.counts[: ranks.rank])
            places = inputs.order.numpy().argsort()[start : start + inputs.counts[ranks.rank]]
        mine = rows[places]
        chosen, roles = ranking.queries.read(texts, mine)
        passes = None
        if is_sharded(student):  # sharded layers are gathered in every pass, so all ranks make equally many
            passes = min(-(-max(inputs.counts) // stage.micro_batch), min(inputs.counts))
        ids = student.tokenize(chosen, roles, length)
        micro = MicroBatches.of(ids, stage.micro_batch, stage.micro_tokens, passes, few_shapes)
        teacher = ranking.targets(mine)
        total = len(rows)
        if not across_ranks:  # dropout differs between ranks
            places, total = places * ranks.world + ranks.rank, total * ranks.world
        return Batch(mine, teacher, micro, None, micro.tokens, micro.padded, 0.0, inputs, places, total)

    return batches_of(prepare, first_step, stage.steps, student.device)


def batch_rows(ranking: Ranking, queries: np.ndarray, ranks: int = 1) -> tuple[np.ndarray, RankInputs]:
    """Return the rows of a whole batch, and the inputs of its loss.

    Args:
        ranking: candidates and targets.
        queries: (Q,) int64.
        ranks: number of ranks that divide the queries, and the documents.

    Returns:
        (Q + M,) int64 rows, the queries and then the distinct documents among their candidates.
    """
    chosen = ranking.of(queries)
    there = chosen.rows >= 0
    documents, numbers = np.unique(chosen.rows[there], return_inverse=True)
    candidates = np.full(chosen.rows.shape, -1, np.int64)
    candidates[there] = numbers
    columns = np.maximum(chosen.positives, 0)
    positives = np.where(chosen.positives >= 0, candidates[np.arange(len(queries)), columns], -1)
    parts = [
        np.concatenate([asked, found])
        for asked, found in zip(
            np.array_split(np.arange(len(queries)), ranks),
            np.array_split(len(queries) + np.arange(len(documents)), ranks),
            strict=True,
        )
    ]
    order = np.concatenate(parts).argsort()  # the place of each row among those of all ranks
    inputs = RankInputs(
        torch.from_numpy(candidates),
        torch.from_numpy(chosen.scores),
        torch.from_numpy(positives),
        torch.from_numpy(order),
        tuple(map(len, parts)),
    )
    return np.concatenate([ranking.queries.trained + queries, documents]), inputs
