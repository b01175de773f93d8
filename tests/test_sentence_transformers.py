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
