"""Stages of texts: the student's embeddings learn from the teachers' embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jasper_fast.config.stage import StageConfig
from jasper_fast.distributed.fsdp import is_sharded
from jasper_fast.distributed.ranks import Ranks
from jasper_fast.models.micro_batches import MicroBatches
from jasper_fast.models.student import Student
from jasper_fast.training.data import Batch, Teachers
from jasper_fast.training.head_init import PRINCIPAL_ROWS, start_at_principal_axes
from jasper_fast.training.parameters import text_parameters
from jasper_fast.training.pooled import PooledStates, pooled_states
from jasper_fast.training.prefetch import batches_of
from jasper_fast.training.run.checkpoint import Position
from jasper_fast.training.sampler import BatchPlan
from jasper_fast.training.stages.base import BaseStage
from jasper_fast.training.stages.losses import StageLoss
from jasper_fast.utils.device import compiles_each_shape

if TYPE_CHECKING:
    from jasper_fast.training.run.run import Run


class TextStage(BaseStage):
    """A stage of texts against the teachers. If it trains no encoder weight, each text is encoded once.

    Args:
        config: the run's configuration.
        index: the stage's position in it.
        data: the texts. None: only checks that need none are made.
        labels: the teacher embeddings. None: the stage is not trained.
    """

    @staticmethod
    def trained_names(student: Student, stage: StageConfig) -> list[str]:
        """Return the names of the parameters that the stage trains."""
        return text_parameters(student, stage)

    def source(self) -> tuple[Any, str]:
        """Return the training texts, and their unit."""
        return self.data.texts, "texts"

    def pooled_rows(self, student: Student) -> int:
        """Return an upper bound of the number of texts that are pooled before the first step."""
        stage, texts = self.config, len(self.data.texts)
        if _trains_encoder(self.trained_names(student, stage)):
            return 0
        return min(texts, stage.texts or texts, stage.steps * stage.batch_size)

    def initialization_problems(self, student: Student, names: list[str]) -> list[str]:
        """Return the problems of starting narrow heads at the widest head's principal axes."""
        stage, problems = self.config, []
        if stage.narrow_start != "principal":
            return []
        narrow = [width for width in stage.heads if width != student.widths[0]]
        if self.run_config.student.head_type == "prefix":
            problems.append("prefix heads are parts of the widest head")
        if _trains_encoder(names):
            problems.append("it trains the encoder, whose embeddings would move away")
        if not narrow:
            problems.append("it has no narrow head")
        # With neighbours, only one batch is certain to have new texts: groups may repeat.
        texts = stage.batch_size * (stage.steps if stage.batches == "random" else 1)
        if stage.steps and texts < max(narrow, default=0):  # without steps, `minutes` will set them
            problems.append(
                f"the head of width {max(narrow)} has more axes than there are texts, {texts}; raise "
                + ("batch_size or steps" if stage.batches == "random" else "batch_size")
            )
        return [f"stage {stage.name!r}: narrow_start: principal is not possible, as {problem}" for problem in problems]

    def pool(self, run: Run, student: Student, plan: BatchPlan) -> None:
        """Pool the texts, if the encoder is frozen."""
        if not _trains_encoder(self.trained_names(student, self.config)):
            self.pooled = pooled_states(run, student, self.config, plan, self.data.fingerprint, self._texts)

    def initialize(self, run: Run, student: Student, start: Position) -> None:
        """Set the loss, and start narrow heads at the principal axes if the stage asks for it."""
        stage = self.config
        if self.pooled is not None and stage.narrow_start == "principal" and not start.stage_step:
            states = self.pooled.read(self.pooled.rows[:PRINCIPAL_ROWS])
            narrow = [width for width in stage.heads if width != student.widths[0]]
            possible = [width for width in narrow if width <= len(states)]  # a short stage reads few texts
            for width in sorted(set(narrow) - set(possible)):
                run.log.info(f"head {width} starts as it is: the stage reads {len(states)} texts, too few for its axes")
            if possible:
                start_at_principal_axes(student, possible, states, self.run_config.seed)
        group, rows = (run.ranks.group, run.ranks.counts(stage.batch_size)) if self.global_loss else (None, None)
        self.loss = StageLoss(stage, student.widths[0], group, rows)

    def _texts(self, rows: Any) -> tuple[list[str], list[str]]:
        chosen = self.data.texts[rows.tolist()]
        return chosen["text"], chosen["role"]

    def batches(self, first_step: int) -> Iterator[tuple[int, Batch]]:
        """Yield (step, this rank's batch) from ``first_step`` to the end of the stage."""
        return text_batches(
            self.config,
            first_step,
            self._plan,
            self.data.texts,
            self.labels,
            self._student,
            self.pooled,
            self._ranks,
            compiles_each_shape(self._student.device, self.run_config.precision),
        )


def text_batches(
    stage: StageConfig,
    first_step: int,
    plan: BatchPlan,
    texts: Any,
    teachers: Teachers,
    student: Student,
    pooled: PooledStates | None,
    ranks: Ranks,
    few_shapes: bool,
) -> Iterator[tuple[int, Batch]]:
    """Yield (step, this rank's batch of texts) from ``first_step`` to the end of the stage.

    Args:
        stage: the stage's settings.
        first_step: the first step.
        plan: the rows of every step.
        texts: a dataset with columns ``text`` and ``role``.
        teachers: the teacher embeddings.
        student: the student, which tokenizes.
        pooled: the states of a frozen encoder. None: texts are tokenized.
        ranks: the ranks that divide a batch.
        few_shapes: whether micro-batches have few different shapes.
    """
    length = stage.max_length or student.max_length
    mine = ranks.rows(stage.batch_size)
    counts = ranks.counts(stage.batch_size)
    # Sharded layers are gathered in every pass, so all ranks make equally many.
    passes = min(-(-counts[0] // stage.micro_batch), counts[-1]) if is_sharded(student) else None

    def prepare(step: int) -> Batch:
        rows = plan(step)[mine]
        teacher = teachers.read(rows)
        if pooled is not None:
            return Batch(rows, teacher, None, pooled.read(rows), 0, 0, 0.0)
        chosen = texts[rows.tolist()]
        ids = student.tokenize(chosen["text"], chosen["role"], length)
        micro = MicroBatches.of(ids, stage.micro_batch, stage.micro_tokens, passes, few_shapes)
        return Batch(rows, teacher, micro, None, micro.tokens, micro.padded, 0.0)

    return batches_of(prepare, first_step, stage.steps, student.device)


def _trains_encoder(names: list[str]) -> bool:
    return any(name.startswith("encoder.") for name in names)
