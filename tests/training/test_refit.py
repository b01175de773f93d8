"""Heads are refitted in closed form, only where held-out documents agree better with the teacher."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from jasper_fast.config.data import ImagesConfig
from jasper_fast.config.load import load_config
from jasper_fast.data.eval_sets import RetrievalSet
from jasper_fast.evaluation.label_free import HeldOut, cosines, neighbour_weights
from jasper_fast.models.folder import load_student
from jasper_fast.reporting.quality import quality_sections
from jasper_fast.train import train
from jasper_fast.training.data import TrainingData
from jasper_fast.training.held_out import LabelledDocuments
from jasper_fast.training.plan import Costs, StageCost, make_plan
from jasper_fast.training.refit import STRENGTHS, Head, refit_heads, refit_line, refitted
from jasper_fast.training.refit_figures import Figures, HeldOutFigures, is_better, nearest_weights
from jasper_fast.training.sample import REFIT_TEXTS, Sample, can_refit, most_sampled, sample_size
from jasper_fast.utils.errors import JasperError
from tests.helpers.runs import assert_same_run, records, settings, write_data

HIDDEN, WIDTH, NARROW = 12, 10, 4


class Heads(nn.Module):
    """The heads of a student, without its encoder."""

    def __init__(self, head_type: str, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.config: Any = type("Settings", (), {"head_type": head_type})
        self.widths = [WIDTH, NARROW]
        widths = self.widths if head_type == "independent" else self.widths[:1]
        self.heads = nn.ModuleDict({str(width): nn.Linear(HIDDEN, width) for width in widths})
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / HIDDEN**0.5)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def world(
    head_type: str = "independent", noise: float = 0.3
) -> tuple[Heads, torch.Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """A student, and states of texts and documents with a teacher that is another linear map of these."""
    random_numbers = np.random.default_rng(3)
    student = Heads(head_type)
    states, held_out = (random_numbers.standard_normal((n, HIDDEN)).astype(np.float32) for n in (400, 60))
    weight = student.heads[str(WIDTH)].weight.detach().numpy()
    other = weight + noise * random_numbers.standard_normal(weight.shape) / HIDDEN**0.5
    targets, teacher = (unit(rows @ other.T).astype(np.float32) for rows in (states, held_out))
    return student, torch.from_numpy(states), targets, held_out, teacher


def judge(held_out: np.ndarray, teacher: np.ndarray) -> HeldOutFigures:
    return HeldOutFigures(held_out.astype(np.float64), neighbour_weights(cosines(teacher)))


def overlap(outputs: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    return (neighbour_weights(cosines(outputs)) * neighbour_weights(cosines(teacher))).sum(axis=1) / 10


@pytest.mark.parametrize("head_type", ["independent", "prefix"])
def test_a_correctable_student_is_corrected_at_every_width(head_type: str) -> None:
    student, states, targets, held_out, teacher = world(head_type, noise=1.0)
    before = copy.deepcopy(student)
    facts = refit_heads(student, states, targets, judge(held_out, teacher), same_space=True)
    assert (facts["texts"], facts["documents"], facts["questions"]) == (400, 60, 0)
    assert [head["width"] for head in facts["heads"]] == [WIDTH, NARROW]
    widest = facts["heads"][0]
    assert widest["strength"] in STRENGTHS
    assert widest["refitted"]["neighbours"] > widest["trained"]["neighbours"] + 0.1
    for head in facts["heads"]:
        name = str(head["width"]) if head_type == "independent" else str(WIDTH)
        old, new = (
            of.heads[name](torch.from_numpy(held_out)).detach().numpy()[:, : head["width"]] for of in (before, student)
        )
        changed = head["strength"] is not None
        assert head["trained"]["neighbours"] == pytest.approx(overlap(old, teacher).mean())
        if changed:
            assert head["refitted"]["neighbours"] == pytest.approx(overlap(new, teacher).mean())
            change = overlap(new, teacher) - overlap(old, teacher)
            assert head["error"]["neighbours"] == pytest.approx(change.std(ddof=1) / 60**0.5)
        assert np.array_equal(old, new) != changed
    again = copy.deepcopy(before)
    assert refit_heads(again, states, targets, judge(held_out, teacher), same_space=True) == facts
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), student.parameters(), strict=True))


def test_a_student_that_equals_the_teacher_stays_bit_by_bit() -> None:
    student, states, _, held_out, _ = world()
    widest = student.heads[str(WIDTH)]
    targets, teacher = (unit(widest(of).detach().numpy()) for of in (states, torch.from_numpy(held_out)))
    before = copy.deepcopy(widest.state_dict())
    facts = refit_heads(student, states, targets, judge(held_out, teacher), same_space=True)
    assert facts["heads"][0]["strength"] is None and facts["heads"][0]["trained"]["neighbours"] == 1.0
    assert all(torch.equal(value, before[key]) for key, value in widest.state_dict().items())


@pytest.mark.parametrize("width", [WIDTH, NARROW])
def test_the_corrected_head_equals_a_ridge_regression_of_rows(width: int) -> None:
    """In float64, from the rows themselves and by the general solver."""
    student, states, targets, *_ = world()
    heads = {
        int(name): Head(of.weight.detach().double().numpy(), of.bias.detach().double().numpy())
        for name, of in student.heads.items()
    }
    rows = states.double().numpy()
    outputs = heads[WIDTH](rows)
    lengths = np.linalg.norm(outputs, axis=1, keepdims=True)
    sources, current = outputs / lengths, heads[width](rows) / lengths
    goal = targets.astype(np.float64)
    if width != WIDTH:  # what the targets explain of the head's embeddings
        goal = goal @ np.linalg.solve(goal.T @ goal + np.eye(WIDTH), goal.T @ current)
    found = refitted(heads[width], heads[WIDTH], rows, targets, same_space=width == WIDTH)
    assert list(found) == list(STRENGTHS)
    for strength, head in found.items():
        padded = np.vstack([sources, strength**0.5 * np.eye(WIDTH)])
        wanted = np.vstack([goal - current, np.zeros((WIDTH, width))])
        correction = np.linalg.lstsq(padded, wanted, rcond=None)[0]
        expected = current + sources @ correction
        np.testing.assert_allclose(head(rows) / lengths, expected, atol=1e-6)
    assert np.abs(found[100.0](rows) - heads[width](rows)).max() < np.abs(found[1.0](rows) - heads[width](rows)).max()


def test_a_head_in_another_space_stays_in_its_space() -> None:
    """A rotated teacher has the same neighbours, so the head need not follow the rotation."""
    corrected = []
    for rotated in (False, True):
        student, states, targets, held_out, teacher = world(noise=1.0)
        rotation = np.linalg.qr(np.random.default_rng(5).standard_normal((WIDTH, WIDTH)))[0]
        targets = (targets @ rotation).astype(np.float32) if rotated else targets
        head = Head(*(of.detach().double().numpy() for of in student.heads[str(WIDTH)].parameters()))
        found = refitted(head, head, states.double().numpy(), targets, same_space=False)
        corrected.append(found[1.0](held_out))
    np.testing.assert_allclose(*corrected, atol=1e-4)


def figures(change: float = 0.0, ndcg: float | None = None, noise: float = 0.0) -> Figures:
    draw = np.random.default_rng(0)
    base, spread = draw.random(100), draw.standard_normal(100)
    spread = (spread - spread.mean()) / spread.std(ddof=1) * 10  # a standard error of 1
    return Figures({"neighbours": base + change + noise * spread}, ndcg)


def test_neighbours_must_rise_by_a_paired_margin_and_no_figure_may_fall() -> None:
    trained = {8: figures(ndcg=0.5)}
    assert is_better(trained, {8: figures(0.01, 0.5)})  # a constant gain has no error
    assert not is_better(trained, {8: figures(0.0, 0.5)}) and not is_better(trained, {8: figures(0.0, 0.6)})
    assert not is_better(trained, {8: figures(0.01, 0.499)})
    assert is_better(trained, {8: figures(2.1, 0.5, noise=1.0)})
    assert not is_better(trained, {8: figures(1.9, 0.5, noise=1.0)})
    both = {8: figures(), 4: figures()}
    assert is_better(both, {8: figures(0.1), 4: figures()})
    assert not is_better(both, {8: figures(0.1), 4: figures(-0.01)})


def test_figures_of_questions_equal_slow_references() -> None:
    draw = np.random.default_rng(2)
    questions, documents, teacher_questions, teacher_documents = (draw.standard_normal((20, 6)) for _ in range(4))
    evalset = RetrievalSet("q", [str(i) for i in range(20)], [str(i) for i in range(20)], [{i: 1} for i in range(20)])
    wanted = nearest_weights({"queries": teacher_questions, "documents": teacher_documents})
    groups = {"queries": questions, "documents": documents}
    held_out = HeldOutFigures(documents, neighbour_weights(cosines(teacher_documents)), evalset, groups, wanted)
    for width, of in held_out.measure(lambda states: states, [6, 3]).items():
        scores, best = (
            unit(q) @ unit(d).T
            for q, d in ((questions[:, :width], documents[:, :width]), (teacher_questions, teacher_documents))
        )
        shared = [len({*np.argsort(-a)[:10]} & {*np.argsort(-b)[:10]}) / 10 for a, b in zip(scores, best, strict=True)]
        np.testing.assert_allclose(of.overlaps["neighbours of questions"], shared)
        ranks = 1 + (scores > np.diag(scores)[:, None]).sum(axis=1)
        assert of.ndcg == pytest.approx(np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0).mean())
        assert list(of.means()) == ["neighbours", "neighbours of questions", "nDCG@10"]


def test_the_line_and_the_report_say_what_was_chosen() -> None:
    def head(width: int, strength: float | None) -> dict[str, Any]:
        return {
            "width": width,
            "strength": strength,
            "best": 3.0,
            "trained": {"neighbours": 0.5, "nDCG@10": 0.7},
            "refitted": {"neighbours": 0.52, "nDCG@10": 0.71 if strength else 0.69},
            "error": {"neighbours": 0.004},
        }

    facts = {"texts": 2048, "documents": 500, "questions": 480, "heads": [head(64, 3.0), head(32, None)]}
    facts["line"] = refit_line(facts)
    assert facts["line"] == (
        "heads refitted in closed form on 2,048 training texts, better on 500 held-out documents: "
        "64 (neighbours 50.0 → 52.0, nDCG@10 70.0 → 71.0); as trained: 32"
    )
    section = next(part for part in quality_sections({"refit": facts}, {}) if part)
    assert "| 64 | neighbours | 50.0 | 52.0 | 0.4 | 3 | refit |" in section
    assert "| 32 | nDCG@10 | 70.0 | 69.0 | – | 3 | trained |" in section
    kept = refit_line({**facts, "heads": [head(64, None)]})
    assert kept == "heads stay as trained: no closed-form refit is better on 500 held-out documents"


@pytest.mark.parametrize(
    ("texts", "most", "trained", "size"),
    [
        (9000, REFIT_TEXTS, 30_000, 6000),  # 5 % of the training time
        (9000, REFIT_TEXTS, 0, 2048),  # what PCA needs
        (1000, REFIT_TEXTS, 30_000, 1000),
        (50_000, REFIT_TEXTS, 10**7, 10_000),
        (9000, 2048, 10**7, 2048),  # no refit
        (9000, 0, 10**7, 0),  # no PCA either
    ],
)
def test_the_sample_takes_a_twentieth_of_the_training_time(texts: int, most: int, trained: int, size: int) -> None:
    assert sample_size(texts, most, trained) == size
    stages = (StageCost("frozen", 0.1, 128, texts, row=0.01, rows=1000), StageCost("all", 1.0, 10, texts))
    costs = Costs(stages, evaluation=7.0, export=1.0, texts=texts, most_sampled=most, encode=0.01)
    tree = load_config().model_dump(mode="json")
    tree["stages"] = [{**tree["stages"][0], "steps": 9}, {**tree["stages"][1], "steps": max(1, trained // 10)}]
    plan = make_plan(load_config({**tree, "student": {**tree["student"], "heads": [384]}}), costs)
    assert plan.sampled == sample_size(texts, most, max(10, trained))
    assert plan.evaluation == pytest.approx(8.0 + 0.01 * plan.sampled)


# --- in a run


@pytest.fixture(scope="module")
def documents_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_texts: list[str]
) -> tuple[Path, dict[str, Any]]:
    """A run with 120 held-out documents, whose heads are trained only a little."""
    folder = tmp_path_factory.mktemp("refit")
    write_data(folder, tiny_texts)
    draw = random.Random(1)
    words = sorted({word for text in tiny_texts for word in text.split()})
    with open(folder / "texts.jsonl", "w") as file:
        for _ in range(1200):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=12))}) + "\n")
    tree = settings(folder, tiny_bert) | {"evaluate": []}
    stage = {"name": "all", "train": ["heads.*"], "heads": [32, 16, 8], "batch_size": 16, "steps": 20, "lr": 1e-4}
    tree["stages"] = [stage]
    train(tree, out=folder / "run")
    return folder, tree


def test_a_run_exports_the_refitted_heads_and_keeps_its_checkpoint(documents_run: tuple[Path, dict[str, Any]]) -> None:
    folder, tree = documents_run
    run = folder / "run"
    results = json.loads((run / "results.json").read_text())
    refit = results["refit"]
    assert (refit["texts"], refit["documents"]) == (results["facts"]["texts"], 120)
    heads = {head["width"]: head for head in refit["heads"]}
    chosen = [head for head in heads.values() if head["strength"] is not None]
    assert chosen and all(head["refitted"]["neighbours"] >= head["trained"]["neighbours"] for head in chosen)
    rows = [row for row in results["label_free"]["rows"] if row["model"] == "student" and "precision" not in row]
    for row in rows:  # the exported model is what was chosen
        head = heads[row["width"]]
        expected = head["trained" if head["strength"] is None else "refitted"]
        assert row["overlap"] == pytest.approx(expected["neighbours"], abs=0.01)
    (asymmetric,) = [row for row in results["label_free"]["rows"] if row["model"] == "documents by teacher"]
    assert asymmetric["width"] == 32 and asymmetric["overlap"] > 0
    (event,) = [record for record in records(run) if record["event"] == "refit"]
    assert event["line"] == refit["line"] and refit["line"].startswith("heads refitted in closed form on ")
    report, card = (run / "report.md").read_text(), (run / "model" / "README.md").read_text()
    assert "## Closed-form refit of the heads" in report and "student, documents by teacher | 32 |" in report
    assert f"After the last stage: {refit['line']}." in card

    off = folder / "off"
    train(tree | {"refit": False}, out=off)
    assert_same_run(run, off)  # the checkpoint has the trained heads
    without = json.loads((off / "results.json").read_text())
    assert "refit" not in without and "Closed-form" not in (off / "report.md").read_text()
    trained, refitted_student = (load_student(of / "model").state_dict() for of in (off, run))
    for name, value in trained.items():
        width = int(name.split(".")[1]) if name.startswith("heads") else None
        changed = width is not None and heads[width]["strength"] is not None
        assert torch.equal(value, refitted_student[name]) != changed, name

    (run / "results.json").unlink()  # killed during the evaluation
    before = {name: value.clone() for name, value in refitted_student.items()}
    train(tree, out=run)
    assert json.loads((run / "results.json").read_text())["refit"] == refit
    for name, value in load_student(run / "model").state_dict().items():
        assert torch.equal(value, before[name]), name


def test_numbers_that_are_not_finite_are_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import jasper_fast.training.refit as module

    student, states, targets, held_out, teacher = world()
    states[7, 3] = torch.nan
    figures_of = judge(held_out, teacher)
    monkeypatch.setattr(module.HeldOutFigures, "of", lambda *_: figures_of)
    run: Any = SimpleNamespace(config=load_config(), device=torch.device("cpu"), precision="fp32", path=tmp_path)
    documents = LabelledDocuments(HeldOut([str(i) for i in range(60)]), teacher)
    labels: Any = SimpleNamespace(read=lambda rows: torch.from_numpy(targets))
    with pytest.raises(
        JasperError, match="refit of the heads: source: row 7 holds NaN .*, or train with `refit: false`"
    ):
        module.refit_run(run, student, labels, documents, Sample(np.arange(400), states))  # type: ignore[arg-type]


def test_when_heads_are_not_refitted(documents_run: tuple[Path, dict[str, Any]]) -> None:
    _, tree = documents_run
    enough, few, none = (TrainingData([], held_out_texts=["text"] * count) for count in (21, 20, 0))
    config = load_config(tree)
    assert can_refit(config, 21) and most_sampled(config, enough) == REFIT_TEXTS
    assert not can_refit(config, 20) and most_sampled(config, few) == 2048
    assert most_sampled(config, none) == most_sampled(config, TrainingData([])) == 0
    off = load_config(tree | {"refit": False})
    assert not can_refit(off, 21) and most_sampled(off, enough) == 2048
    images = ImagesConfig(sources=[{"path": "images"}])
    assert not can_refit(config.model_copy(update={"images": images}), 21)
