"""The interface of a stage, its common part, and the registry of stage kinds.

A new kind is a module with a subclass of :class:`BaseStage`, or any :class:`Stage`, and a line in ``STAGES``.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Protocol

import torch

from jasper_fast.config.run import Config
from jasper_fast.config.stage import StageConfig
from jasper_fast.losses import AnyOutput
from jasper_fast.models.backbone import check_max_length
from jasper_fast.models.student import Student
from jasper_fast.training.data import Batch, Teachers, TrainingData
from jasper_fast.training.memory import memory_advice
from jasper_fast.training.muon import hidden_matrices
from jasper_fast.training.optim import learning_rate, make_optimizer
from jasper_fast.training.parameters import set_trained
from jasper_fast.training.pooled import PooledStates
from jasper_fast.training.run.checkpoint import Position
from jasper_fast.training.sampler import BatchPlan, batch_plan, rows_up_to
from jasper_fast.utils.errors import JasperError, Problems

if TYPE_CHECKING:
    from jasper_fast.training.run.run import Run

# Field of StageConfig that selects the kind -> its class, imported when a run has such a stage. Text is the default.
STAGES = {
    "text": "jasper_fast.training.stages.text:TextStage",
    "vision": "jasper_fast.training.stages.vision:VisionStage",
    "rank": "jasper_fast.training.stages.rank:RankStage",
}


class Stage(Protocol):
    """One stage of a run: what trains, on which batches, with which loss.

    Args:
        config: the stage's settings.
        index: its position in the run's configuration.
        loss: the loss of a batch. See :func:`jasper_fast.training.step.take_gradients`. It is set by ``begin``.
    """

    config: StageConfig
    index: int
    loss: Callable[..., AnyOutput]

    def problems(self, student: Student, ranks: int) -> list[str]:
        """Return the problems of the stage with a student and a number of ranks, before texts are read."""
        ...

    def begin(self, run: Run, student: Student, start: Position) -> torch.optim.Optimizer:
        """Prepare the student and the batches, and return the optimizer."""
        ...

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        ...

    def batches(self, first_step: int) -> Iterator[tuple[int, Batch]]:
        """Yield (step, this rank's batch) from ``first_step`` to the end of the stage."""
        ...

    def end(self, run: Run) -> None:
        """Delete what only this stage needed, after its last checkpoint."""
        ...


def stage_class(stage: StageConfig) -> type[BaseStage]:
    """Return the class of a stage's kind."""
    return resolve_name(STAGES[next((kind for kind in STAGES if getattr(stage, kind, None) is not None), "text")])


def build_stage(
    config: Config, index: int, data: TrainingData | None = None, labels: Teachers | None = None
) -> BaseStage:
    """Return a stage of a run.

    Args:
        config: the run's configuration.
        index: the stage's position in it.
        data: the texts and images. None: only checks that need none are made.
        labels: the teacher embeddings. None: the stage is not trained.
    """
    return stage_class(config.stages[index])(config, index, data, labels)


def build_stages(config: Config, data: TrainingData | None = None, labels: Teachers | None = None) -> list[BaseStage]:
    """Return all stages of a run. See :func:`build_stage`."""
    return [build_stage(config, index, data, labels) for index in range(len(config.stages))]


def trained_names(student: Student, stage: StageConfig) -> list[str]:
    """Return the names of the parameters that a stage trains, in the model's order.

    Raises:
        JasperError: a glob of ``train`` matches no parameter, or one that the kind of stage cannot train.
    """
    return stage_class(stage).trained_names(student, stage)


def describe_stage(student: Student, stage: StageConfig, done: int = 0) -> str:
    """Return a line about a stage: its parameters, heads and steps.

    Args:
        student: the student, of which only the stage's parameters require a gradient.
        stage: its settings.
        done: steps of the stage that are done.
    """
    trained = [p.numel() for p in student.parameters() if p.requires_grad]
    total = sum(p.numel() for p in student.parameters())
    where = f", from its step {done}" if done else ""
    return (
        f"stage {stage.name}: trains {sum(trained):,} of {total:,} parameters ({len(trained)} tensors), heads "
        f"{stage.heads}, {stage.steps} steps of {stage.batch_size}, lr {stage.lr:g}{where}"
    )


class BaseStage(ABC):
    """The part that stages have in common. See :class:`Stage`.

    Args:
        config: the run's configuration.
        index: the stage's position in it.
        data: the texts and images. None: only checks that need none are made.
        labels: the teacher embeddings. None: the stage is not trained.
    """

    loss: Callable[..., AnyOutput]

    def __init__(
        self, config: Config, index: int, data: TrainingData | None = None, labels: Teachers | None = None
    ) -> None:
        self.run_config, self.index, self.config = config, index, config.stages[index]
        self._data, self._labels = data, labels
        self.pooled: PooledStates | None = None  # of a frozen encoder

    @staticmethod
    @abstractmethod
    def trained_names(student: Student, stage: StageConfig) -> list[str]:
        """Return the names of the parameters that a stage of this kind trains."""

    @abstractmethod
    def source(self) -> tuple[Any, str]:
        """Return the dataset that batches are drawn from, and its unit in the plural."""

    @abstractmethod
    def pooled_rows(self, student: Student) -> int:
        """Return an upper bound of the number of states that the stage pools before its first step."""

    @abstractmethod
    def batches(self, first_step: int) -> Iterator[tuple[int, Batch]]:
        """Yield (step, this rank's batch) from ``first_step`` to the end of the stage."""

    @abstractmethod
    def pool(self, run: Run, student: Student, plan: BatchPlan) -> None:
        """Encode once what a frozen encoder would encode in every step."""

    @abstractmethod
    def initialize(self, run: Run, student: Student, start: Position) -> None:
        """Set the loss, and the stage's initial weights unless it resumes."""

    def available(self) -> int:
        """Return the number of texts, images or queries that batches are drawn from."""
        available = min(len(self.source()[0]), self.config.texts or len(self.source()[0]))
        if self.config.max_chars is None:
            return available
        return len(rows_up_to(self.source()[0], available, self.config.max_chars))

    def facts(self) -> dict[str, str]:
        """Return identities of what else decides the stage's numbers, next to texts, images and teachers."""
        return {}

    def lines(self) -> list[str]:
        """Return lines about what the stage chose for the user."""
        return []

    def rehearse(self) -> None:  # noqa: B027 - the targets of most stages need no time
        """Put random values in the place of targets that take long to compute, before steps are measured."""

    @property
    def data(self) -> TrainingData:
        """The texts and images."""
        assert self._data is not None, "the stage was built for checks alone"
        return self._data

    @property
    def labels(self) -> Teachers:
        """The teacher embeddings."""
        assert self._labels is not None, "the stage was built for checks alone"
        return self._labels

    @property
    def seed(self) -> tuple[int, int]:
        """The run's seed and the stage's index, which decide its draws."""
        return self.run_config.seed, self.index

    @property
    def global_loss(self) -> bool:
        """True if a loss compares the texts of all ranks."""
        return self.run_config.losses.scope == "global"

    def problems(self, student: Student, ranks: int) -> list[str]:
        """Return the problems of the stage with a student and a number of ranks, before texts are read."""
        problems, stage = Problems(), self.config
        with problems:
            names = self.trained_names(student, stage)
            set_trained(student, names)
            problems += self.initialization_problems(student, names)
            try:
                student.set_gradient_checkpointing(stage.gradient_checkpointing)
            except JasperError as error:
                problems.append(f"stage {stage.name!r}: {error}")
            if stage.optimizer == "muon" and not hidden_matrices(student):
                problems.append(
                    f"stage {stage.name!r}: optimizer muon trains matrices of the encoder's layers, and this stage "
                    "trains none. Fix: give last_layers, or use optimizer: adamw"
                )
        student.set_gradient_checkpointing(False)
        if stage.max_length is not None:
            with problems:
                check_max_length(student.encoder, stage.max_length, f"stages.{self.index}.max_length")
        return [*problems, *(f"stage {stage.name!r}: {problem}" for problem in self.parallel_problems(ranks))]

    def initialization_problems(self, student: Student, names: list[str]) -> list[str]:
        """Return the problems of the initialization of weights that the stage sets."""
        return []

    def parallel_problems(self, ranks: int) -> list[str]:
        """Return the problems of training the stage on several ranks."""
        problems, stage = [], self.config
        if stage.batch_size < ranks:
            problems.append(
                f"a batch of {stage.batch_size} texts cannot be shared by {ranks} processes. Fix: raise batch_size or "
                "start fewer"
            )
        if self.run_config.parallel.mode == "fsdp" and stage.micro_tokens is not None and ranks > 1:
            problems.append(
                "micro_tokens cuts each rank's texts into another number of forward passes, and sharded ranks must "
                "make equally many. Fix: use micro_batch, or parallel.mode: ddp"
            )
        if self.run_config.parallel.mode == "fsdp" and stage.optimizer == "muon" and ranks > 1:
            problems.append(
                "optimizer muon needs whole matrices, and parallel.mode fsdp shards them. Fix: use optimizer: adamw, "
                "or parallel.mode: ddp"
            )
        return problems

    def begin(self, run: Run, student: Student, start: Position) -> torch.optim.Optimizer:
        """Freeze what does not train, plan the batches, pool what is encoded once, and return the optimizer.

        Args:
            run: the run.
            student: the student as the stage before left it.
            start: the position to start or resume from.

        Raises:
            JasperError: too few texts differ for the batches, or memory did not suffice.
            Stopped: a signal asked to stop while states were pooled.
        """
        stage = self.config
        set_trained(student, self.trained_names(student, stage))
        student.train()
        student.set_gradient_checkpointing(stage.gradient_checkpointing)
        optimizer = make_optimizer(student, stage)
        self._student, self._ranks = student, run.ranks
        started = time.perf_counter()
        self._plan = run.ranks.main_first(lambda: self.plan(run))
        run.log.event("plan", stage=stage.name, seconds=time.perf_counter() - started)
        for line in self.lines():
            run.log.info(line)
        started = time.perf_counter()
        with memory_advice(student, None, stage, run.device, run.precision):
            self.pool(run, student, self._plan)
        if self.pooled is not None:
            seconds = time.perf_counter() - started
            run.log.event("pooling", stage=stage.name, texts=len(self.pooled.rows), seconds=seconds)
        self.initialize(run, student, start)
        return optimizer

    def plan(self, run: Run) -> BatchPlan:
        """Return the rows of every step."""
        return batch_plan(self.run_config, self.index, self.source()[0], self.labels, run.log.info)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return learning_rate(self.config, step)

    def end(self, run: Run) -> None:
        """Delete the pooled states, once the checkpoint that makes them useless is on disk."""
        if self.pooled is not None:
            run.wait_for_checkpoint()
            self.pooled.discard()
