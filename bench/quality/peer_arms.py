"""The peers of ``python -m bench distil``: how each is trained on our texts and teacher, and how it is scored."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jasper_fast.config.run import Config
from jasper_fast.models.embedder import model_encoder, normalise
from jasper_fast.models.hub import resolve_model
from jasper_fast.models.student import Student
from jasper_fast.training.optim import cycle_factor
from jasper_fast.utils.device import pick_device
from jasper_fast.utils.errors import JasperError

WARMUP = 0.1  # fraction of the training time
CYCLES = 3  # of LEAF
PCA_TEXTS = 5000
INSTALL = 'pip install -e ".[bench,distil-peers]"'

Encoder = Callable[[list[str], str], dict[int, np.ndarray]]


@dataclass(frozen=True)
class Peer:
    """One peer.

    Args:
        train: function that trains it.
        text: what it does, for the page.
        family: peers of one family share a learning rate, which is searched with ``searched`` of them.
        searched: True for that peer.
        lr: learning rate of its published recipe, which is searched too. 0: it has none.
        fixed: True if nothing in it has a learning rate.
        needs: modules that must be installed.
    """

    train: Callable[[Training], Trained]
    text: str
    family: str
    searched: bool = False
    lr: float = 0.0
    fixed: bool = False
    needs: tuple[str, ...] = ()

    def rates(self, given: Sequence[float]) -> list[float]:
        """Return the learning rates to search: its own and the given ones, none if it has no rate."""
        return [] if self.fixed else [*dict.fromkeys([*([self.lr] if self.lr else []), *given])]


@dataclass(frozen=True)
class Training:
    """Texts, teacher and settings that a peer is trained with.

    Args:
        arm: name of the peer.
        config: our configuration, with the seed of the run.
        texts: training texts, a dataset with ``text`` and ``role``.
        teachers: their teacher embeddings, read by row.
        seconds: seconds of training.
        lr: peak learning rate.
        batch: texts per step.
    """

    arm: str
    config: Config
    texts: Any
    teachers: Any
    seconds: float
    lr: float
    batch: int

    @property
    def widest(self) -> int:
        """Full width of the student."""
        return self.config.student.heads[0]


@dataclass(frozen=True)
class Trained:
    """A trained peer: the seconds and steps it took, and its encoder."""

    seconds: float
    steps: int
    encode: Encoder


def missing(arm: str) -> list[str]:
    """Return the modules that an arm needs and that are not installed."""
    peer = PEERS.get(arm)
    return [name for name in peer.needs if importlib.util.find_spec(name) is None] if peer else []


def score_peer(arm: str, config: Config, encode: Encoder, texts: Any) -> list[dict[str, Any]]:
    """Return a peer's result rows. Peers without narrow heads are reduced by their PCA and by truncation."""
    from jasper_fast.data.eval_loaders import load_evals
    from jasper_fast.evaluation.score import PCA, TEACHER, TRUNCATED, score_rows, teacher_floors

    evalsets = load_evals(config.evaluate)
    if arm.endswith("matryoshka"):
        return score_rows(evalsets, {arm: encode})
    some = texts[: config.stages[-1].texts or PCA_TEXTS]  # as many as our narrow heads train on
    vectors = encode(some["text"], "document")[config.student.heads[0]]
    floors = teacher_floors(vectors, config.student.heads)
    names = {TEACHER: arm, PCA: f"{arm} + PCA", TRUNCATED: f"{arm} + truncation"}
    rows = score_rows(evalsets, {TEACHER: encode}, floors)  # floors are computed for the model with the teacher's name
    return [row | {"model": names[row["model"]]} for row in rows]


# Peers with the trainer of sentence-transformers.


def train_with_trainer(job: Training) -> Trained:
    """Train with ``SentenceTransformerTrainer`` for the seconds given, of wall time."""
    model = peer_student(job.config)
    shape = cycles if job.arm == "leaf" else warm_and_fall
    clock = by_the_clock(job.seconds, job.lr, shape)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(job, model, folder)
        trainer.add_callback(clock)
        trainer.train()
    widths = job.config.student.heads if job.arm.endswith("matryoshka") else [job.widest]
    return Trained(clock.spent, trainer.state.global_step, model_encoder(trainer.model.eval(), widths))


def _trainer(job: Training, model: Any, folder: str) -> Any:
    """Set up the trainer as in its documentation, on the same student: encoder, mean pooling, one Dense."""
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    arguments = SentenceTransformerTrainingArguments(
        output_dir=folder,
        max_steps=10**9,  # by_the_clock ends training
        per_device_train_batch_size=job.batch,
        learning_rate=job.lr,
        lr_scheduler_type="constant",  # by_the_clock sets the rate
        seed=job.config.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    data = peer_dataset(job.texts, job.teachers)
    return SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=_loss(job, model))


def _loss(job: Training, model: Any) -> Any:
    """Return the loss of an arm."""
    from sentence_transformers.sentence_transformer import losses

    if job.arm == "leaf":
        return PlainL2(model)
    loss: Any = losses.EmbedDistillLoss(model, distance_metric="mse" if "mse" in job.arm else "cosine")
    if job.arm.endswith("matryoshka"):
        loss = losses.MatryoshkaLoss(model, loss, matryoshka_dims=job.config.student.heads)
    return loss


class PlainL2(nn.Module):
    """LEAF's loss: the mean Euclidean distance of the student's embeddings from the teacher's.

    Args:
        model: a sentence-transformers model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Any, labels: Tensor) -> Tensor:
        """Return the loss () of one column of texts and their teacher embeddings (B, E)."""
        (column,) = features
        embeddings = self.model(column)["sentence_embedding"]
        return (embeddings - labels.to(embeddings)).norm(dim=1).mean()


def peer_dataset(texts: Any, teachers: Any) -> Any:
    """Return a dataset with ``text`` and ``label`` (teacher embedding), for sentence-transformers' distillation."""
    from datasets import Dataset

    vectors = teachers.read(np.arange(len(texts))).numpy()
    return Dataset.from_dict({"text": texts["text"][:], "label": list(vectors)}).with_format("torch", ["label"], True)


def peer_student(config: Config) -> Any:
    """Return our untrained encoder with mean pooling, an identity Dense, and normalisation.

    The identity is the best start, because the student's last layer is its teacher's. Without normalisation, MSE would
    spend its time on the length of the embeddings.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    torch.manual_seed(config.seed)
    student = Student.build(config.student)
    with tempfile.TemporaryDirectory() as folder:
        student.encoder.save_pretrained(folder)
        student.tokenizer.save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=config.student.max_length)
    widest, hidden = config.student.heads[0], student.hidden_size
    dense = Dense(
        hidden,
        widest,
        activation_function=torch.nn.Identity(),
        init_weight=torch.eye(widest, hidden),
        init_bias=torch.zeros(widest),
    )
    modules = [transformer, Pooling(hidden, "mean"), dense, Normalize()]
    return SentenceTransformer(modules=modules, device=str(pick_device()))


def warm_and_fall(done: float) -> float:
    """Return the fraction of the peak rate after a fraction of the time: warm-up and linear decay."""
    return max(0.0, min(done / WARMUP, (1 - done) / (1 - WARMUP)))


def cycles(done: float) -> float:
    """Return LEAF's fraction of the peak rate after a fraction of the time: equal cycles, each down to a tenth."""
    return cycle_factor(min(done, 1.0 - 1e-9) * CYCLES % 1.0)


def by_the_clock(seconds: float, lr: float, shape: Callable[[float], float]) -> Any:
    """Return a trainer callback whose learning rate follows the wall time instead of the steps.

    The schedule ends when the time ends, for any length of batches. Start-up does not count.
    """
    from transformers import TrainerCallback

    class ByTheClock(TrainerCallback):
        spent = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
            rate = lr * shape((time.perf_counter() - self.start) / seconds)
            for group in optimizer.param_groups:
                group["lr"] = rate

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.spent = time.perf_counter() - self.start
            control.should_training_stop = self.spent >= seconds

    return ByTheClock()


# Peers that are packages.


def train_smallmodel(job: Training) -> Trained:
    """Cut and distil the teacher with the package EasySmallEmbeddingModel.

    It trains by epochs. A short run measures its speed. It then gets one epoch of as many texts as the seconds allow,
    or several epochs of all.
    """
    from sentence_transformers import SentenceTransformer
    from transformers import AutoConfig

    package = importlib.import_module("smallmodel")
    distill = importlib.import_module("smallmodel.distill").distill
    folder = teacher_folder(job.config, "smallmodel")
    encoder = AutoConfig.from_pretrained(folder)
    package.register_teacher(
        "teacher",
        model_id=folder,
        hidden_dim=encoder.hidden_size,
        num_layers=encoder.num_hidden_layers,
        intermediate_size=encoder.intermediate_size,
        vocab_size=encoder.vocab_size,
    )
    torch.manual_seed(job.config.seed)
    words = np.random.default_rng(job.config.seed).permutation(np.array(job.texts["text"][:], dtype=object)).tolist()
    with tempfile.TemporaryDirectory() as output:
        layers = job.config.student.layers or list(range(encoder.num_hidden_layers))
        cut = package.SmallModel("teacher", layer_indices=layers, output_dir=output)
        student = cut.create(no_prune=True)  # the same student as everyone's

        def run(texts: list[str], epochs: int, suffix: str) -> tuple[float, str]:
            begin = time.perf_counter()
            made = distill(folder, student, texts=texts, epochs=epochs, batch_size=job.batch, lr=job.lr, suffix=suffix)
            return time.perf_counter() - begin, made

        few, more = ([words[i % len(words)] for i in range(n * job.batch)] for n in (1, 5))
        first, second = run(few, 1, "_first")[0], run(more, 1, "_second")[0]
        per_step = max(1e-4, (second - first) / 4)
        steps = max(1, round((job.seconds - max(0.0, first - per_step)) / per_step))
        each = len(words) // job.batch  # steps of an epoch
        if steps < each:
            seconds, made = run(words[: steps * job.batch], 1, "_done")
        else:
            epochs = -(-steps // each)
            steps, (seconds, made) = epochs * each, run(words, epochs, "_done")
        model = SentenceTransformer(made)
    model.max_seq_length = job.config.student.max_length
    return Trained(seconds, steps, model_encoder(model.eval(), [job.widest]))


def train_model2vec(job: Training) -> Trained:
    """Make a static model of the teacher's tokens with model2vec. It needs no texts, and few seconds."""
    from model2vec.distill import distill

    begin = time.perf_counter()
    model = distill(teacher_folder(job.config, "model2vec"), pca_dims=job.widest, device="cpu")
    seconds = time.perf_counter() - begin

    def encode(texts: list[str], role: str) -> dict[int, np.ndarray]:
        return {job.widest: normalise(np.asarray(model.encode(list(texts)), dtype=np.float32))}

    return Trained(seconds, 0, encode)


def teacher_folder(config: Config, peer: str) -> str:
    """Return the folder of the only teacher, which a package reads itself.

    Raises:
        JasperError: there are several teachers, or one without a local model.
    """
    (teacher, *others) = config.teachers
    folder = resolve_model(teacher.model) if teacher.model and not others else ""
    if not Path(folder, "config.json").is_file():
        raise JasperError(
            f"{peer}: got {len(config.teachers)} teachers ({teacher.model}), expected one model in a local folder. "
            f"Fix: leave {peer} out of --arms"
        )
    return folder


ST = "`EmbedDistillLoss` of sentence-transformers, under its trainer"
PEERS = {
    "st-mse": Peer(train_with_trainer, f"{ST}, as MSE", "st"),
    "st-cosine": Peer(train_with_trainer, f"{ST}, as cosine", "st", searched=True),
    "st-mse-matryoshka": Peer(train_with_trainer, f"{ST}, as MSE inside `MatryoshkaLoss`", "st"),
    "st-cosine-matryoshka": Peer(train_with_trainer, f"{ST}, as cosine inside `MatryoshkaLoss`", "st"),
    "leaf": Peer(
        train_with_trainer,
        "the recipe of LEAF (arXiv 2509.12539), written here: plain L2 distance, batches of 32, AdamW, three cycles in "
        "each of which the learning rate falls to a tenth. LEAF's own rate is 1e-4",
        "leaf",
        searched=True,
        lr=1e-4,
    ),
    "smallmodel": Peer(
        train_smallmodel,
        "the package EasySmallEmbeddingModel: the same layers, MSE and cosine, at most 64 tokens. It runs the teacher "
        "in every step, so it sees fewer texts. Its own rate is 2e-5",
        "smallmodel",
        searched=True,
        lr=2e-5,
        needs=("smallmodel",),
    ),
    "model2vec": Peer(
        train_model2vec,
        "the package model2vec: a static table of the teacher's tokens. It uses no texts, and is ready in seconds",
        "model2vec",
        fixed=True,
        needs=("model2vec", "skeletoken"),
    ),
}
