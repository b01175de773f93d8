"""The losses inside sentence-transformers' own trainer."""

from pathlib import Path

import pytest
import torch

from jasper_fast import losses
from jasper_fast.sentence_transformers import JasperLoss


class Bag(torch.nn.Module):
    """A model that looks like a SentenceTransformer to a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(16, 8)

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": self.table(features["input_ids"]).mean(dim=1)}


def test_several_columns_are_one_batch():
    model = Bag()
    first, second = ({"input_ids": torch.randint(16, (6, 3))} for _ in range(2))
    vectors = torch.cat([model(first)["sentence_embedding"], model(second)["sentence_embedding"]])
    teacher = torch.randn(6, 2, 8)
    wanted = losses.JasperLoss()(vectors, torch.cat([teacher[:, 0], teacher[:, 1]])).loss
    torch.testing.assert_close(JasperLoss(model)([first, second], teacher), wanted)
    shared = losses.JasperLoss()(vectors, torch.cat([teacher[:, 0], teacher[:, 0]])).loss
    torch.testing.assert_close(JasperLoss(model)([first, second], teacher[:, 0]), shared)


def test_labels_that_are_no_teacher_vectors_are_refused():
    with pytest.raises(ValueError, match="label column"):
        JasperLoss(Bag())([{"input_ids": torch.zeros(4, 2, dtype=torch.long)}], torch.zeros(4))


TEXTS = {"input_ids": torch.arange(12).reshape(4, 3)}
ADD = "Fix: put one teacher embedding per text, a list of floats, into the dataset's label column"


class Tokens(torch.nn.Module):
    """A transformer without pooling."""

    def forward(self, features):
        return {"token_embeddings": torch.zeros(4, 3, 8)}


class Bare(torch.nn.Module):
    def forward(self, features):
        return torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("columns", "labels", "problem"),
    [
        (1, None, f"label: expected teacher embeddings of shape (4, E), got none. {ADD}"),
        (2, None, "label: expected teacher embeddings of shape (4, E) or (4, 2, E), got none"),
        (1, torch.zeros(4), f"(4, E), got (4,). {ADD}"),
        (1, torch.arange(4), f"got (4,) of int64. {ADD}"),
        (1, torch.zeros(4, 8, dtype=torch.long), "got (4, 8) of int64"),
        (1, torch.zeros(4, 8) > 0, "got (4, 8) of bool"),
        (1, torch.zeros(4, 8, dtype=torch.complex64), "got (4, 8) of complex64"),
        (1, [None] * 4, "as a tensor, got list"),
        (1, [[1.0] * 8] * 4, "as a tensor, got list"),
        (1, ["a", "b", "c", "d"], "as a tensor, got list"),
        (1, torch.zeros(4, 8).numpy(), "as a tensor, got ndarray"),
        (1, torch.zeros(5, 8), "got (5, 8). Fix: give one embedding per text"),
        (1, torch.zeros(1, 8), "got (1, 8). Fix: give one embedding per text"),
        (2, torch.zeros(4, 3, 8), "(4, E) or (4, 2, E), got (4, 3, 8). Fix: give one embedding"),
        (1, torch.zeros(4, 2, 8), "got (4, 2, 8). Fix: give one embedding"),
        (1, torch.zeros(4, 1, 1, 8), "got (4, 1, 1, 8)"),
        (1, torch.zeros(4, 0), "teacher: expected shape (B, D) with B, D >= 1, got (4, 0)"),
        (0, torch.zeros(4, 8), "expected at least one column of texts, got none"),
    ],
)
def test_wrong_labels_say_what_is_expected(columns, labels, problem):
    with pytest.raises(ValueError) as error:
        JasperLoss(Bag())([TEXTS] * columns, labels)
    assert problem in str(error.value)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match=r"expected shape \(B, D\) with B, D >= 1, got \(0, 8\)"):
        JasperLoss(Bag())([{"input_ids": torch.zeros(0, 3, dtype=torch.long)}], torch.zeros(0, 8))


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (
            "sentence-transformers/all-MiniLM-L6-v2",
            "model: expected a SentenceTransformer, got str. Fix: load it first",
        ),
        (None, "model: expected a SentenceTransformer, got NoneType"),
        (
            Tokens(),
            r"expected an output with sentence_embedding, got \['token_embeddings'\]. Fix: add a Pooling module",
        ),
        (Bare(), "expected an output with sentence_embedding, got Tensor"),
    ],
)
def test_what_is_no_sentence_transformer_is_refused(model, problem):
    with pytest.raises(TypeError, match=problem):
        JasperLoss(model)([TEXTS], torch.zeros(4, 8))


@pytest.mark.slow
def test_a_trainer_without_a_label_column_says_so(tiny_bert: Path, tiny_texts: list[str], tmp_path: Path):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments

    model = SentenceTransformer(str(tiny_bert), device="cpu")
    arguments = Arguments(str(tmp_path), max_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True)
    texts = Dataset.from_dict({"text": tiny_texts[:8]})
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=texts, loss=JasperLoss(model))
    with pytest.raises(ValueError, match=r"label: expected teacher embeddings of shape \(8, E\), got none"):
        trainer.train()


@pytest.mark.slow
def test_trainer_trains(tiny_bert: Path, tiny_texts: list[str], tmp_path: Path):
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    model = SentenceTransformer(str(tiny_bert), device="cpu")
    teacher = torch.nn.functional.normalize(torch.randn(64, 32) + torch.randn(32))
    dataset = Dataset.from_dict({"text": tiny_texts[:64], "label": teacher.tolist()})
    loss = JasperLoss(model, neighbourhood=1.0)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        max_steps=24,
        learning_rate=3e-3,
        logging_steps=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss)
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 6
    assert history[-1] < 0.8 * history[0]
