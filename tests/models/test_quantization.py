"""Embeddings as int8 codes and bits: sentence-transformers' codes, and straight-through training for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jasper_fast.config.stage import StageConfig
from jasper_fast.data.eval_sets import RetrievalSet, SimilaritySet
from jasper_fast.evaluation.metrics import score_codes, score_embeddings
from jasper_fast.evaluation.quantized import parse_precisions, quantize_groups
from jasper_fast.losses import neighbourhood_loss
from jasper_fast.models.quantization import int8_ranges, read_ranges, straight_through
from jasper_fast.training.stages.losses import StageLoss
from jasper_fast.utils.errors import JasperError

quantize_embeddings = pytest.importorskip("sentence_transformers.util").quantize_embeddings


def unit(n, d, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_stock_quantiser_rounds_to_one_step_with_our_ranges():
    vectors = unit(500, 24)
    step = np.abs(vectors).max() / 127
    codes = quantize_embeddings(vectors, "int8", ranges=int8_ranges(vectors))
    assert codes.dtype == np.int8
    expected = np.clip(np.floor(vectors.astype(np.float64) / step + 0.5), -128, 127)
    assert (codes != expected).mean() < 1e-3 and np.abs(codes - expected).max() <= 1  # float32 near rounding edges
    beyond = quantize_embeddings(vectors * 3, "int8", ranges=int8_ranges(vectors))
    assert beyond.min() == -128 and beyond.max() == 127
    cosine = (codes @ codes.T.astype(np.float64)) * step**2
    assert np.abs(cosine - vectors.astype(np.float64) @ vectors.T).max() < 0.02


def test_ranges_need_finite_nonzero_embeddings():
    with pytest.raises(ValueError, match="not all zero"):
        int8_ranges(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="finite"):
        int8_ranges(np.array([[np.inf, 1.0]]))


@pytest.mark.parametrize("width", [3, 8, 17])
def test_straight_through_has_the_value_of_codes_and_the_gradient_of_unit_rows(width):
    rows = torch.randn(6, width, dtype=torch.float64)
    rows[0, 0] = 0.0
    given = rows.clone().requires_grad_()
    signs = straight_through(given, "ubinary")
    bits = np.unpackbits(quantize_embeddings(rows.numpy(), "ubinary"), axis=1)[:, :width]
    assert np.array_equal(signs.detach().numpy() > 0, bits.astype(bool))
    torch.testing.assert_close(signs.norm(dim=1), torch.ones(6, dtype=torch.float64))
    weight = torch.randn(6, width, dtype=torch.float64)
    (got,) = torch.autograd.grad((signs * weight).sum(), given)
    plain = rows.clone().requires_grad_()
    (wanted,) = torch.autograd.grad((torch.nn.functional.normalize(plain, dim=1) * weight).sum(), plain)
    torch.testing.assert_close(got, wanted)

    levels = straight_through(rows, "int8")
    normal = torch.nn.functional.normalize(rows, dim=1)
    step = normal.abs().amax() / 127
    assert ((levels - normal).abs() <= step / 2 + 1e-12).all() and not torch.equal(levels, normal)
    torch.testing.assert_close((levels / step).round(), levels / step)


def test_training_and_export_use_the_same_int8_codes():
    """Compare with the codes of sentence-transformers' quantizer and our ranges."""
    vectors = unit(200, 24)
    levels = straight_through(torch.from_numpy(vectors).double(), "int8").numpy()
    codes = quantize_embeddings(vectors, "int8", ranges=int8_ranges(vectors)).astype(np.float64)
    step = np.abs(vectors).max() / 127
    assert np.abs(levels / step - codes).max() < 1.01 and (np.abs(levels / step - codes) > 0.01).mean() < 1e-3


def test_straight_through_of_zero_and_nan():
    assert straight_through(torch.zeros(2, 5), "int8").eq(0).all()
    for precision in ("int8", "ubinary"):
        assert straight_through(torch.full((1, 5), torch.nan), precision).isnan().all()
    with pytest.raises(ValueError, match="'int8' or 'ubinary'"):
        straight_through(torch.ones(2, 5), "int4")


def stage(**fields):
    settings = {"name": "s", "train": ["*"], "heads": [16, 8], "steps": 1, "lr": 1.0, "batch_size": 12}
    weights = {"cosine": 0, "similarity": 0, "relative_similarity": 0, "neighbourhood": 1}
    return StageConfig(**{**settings, "narrow_weights": weights, **fields})


@pytest.mark.parametrize("target", ["teacher", "self"])
def test_a_stage_adds_the_losses_of_its_codes(target):
    teacher = torch.nn.functional.normalize(torch.randn(12, 16), dim=1)
    heads = {width: torch.randn(12, width, requires_grad=True) for width in (16, 8)}
    plain = StageLoss(stage(narrow_target=target), 16)(heads, teacher)
    both = StageLoss(stage(narrow_target=target, codes=["ubinary", "int8"], codes_weight=0.5), 16)(heads, teacher)
    against = heads[16].detach() if target == "self" else teacher
    extra = sum(
        neighbourhood_loss(straight_through(v, precision), against)
        for v in heads.values()
        for precision in ("ubinary", "int8")
    )
    torch.testing.assert_close(both.loss, plain.loss + 0.5 * extra)
    assert both.parts == plain.parts


def test_training_for_bits_lowers_their_loss():
    torch.manual_seed(0)
    states = torch.randn(64, 24)
    teacher = torch.nn.functional.normalize(states @ torch.randn(24, 16), dim=1)

    def trained(codes):
        torch.manual_seed(1)
        heads = {width: torch.nn.Linear(24, width) for width in (16, 8)}
        loss_of = StageLoss(stage(codes=codes, batch_size=64), 16)
        optimizer = torch.optim.Adam([p for head in heads.values() for p in head.parameters()], lr=1e-2)
        for _ in range(150):
            loss = loss_of({w: head(states) for w, head in heads.items()}, teacher).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            return float(neighbourhood_loss(straight_through(heads[8](states), "ubinary"), teacher))

    assert trained(["ubinary"]) < 0.9 * trained([])


def test_codes_without_a_loss_to_train_them_are_rejected():
    weights = {"cosine": 1, "similarity": 0, "relative_similarity": 0}
    with pytest.raises(ValueError, match="codes are trained by"):
        stage(codes=["int8"], weights=weights, narrow_weights=None)


def retrieval(queries=5, documents=60):
    relevant = [{i: 1} for i in range(queries)]
    return RetrievalSet("r", [f"q{i}" for i in range(queries)], [f"d{i}" for i in range(documents)], relevant)


def test_bits_are_ranked_by_agreement_and_rescored_by_int8():
    documents, queries = unit(60, 12), unit(60, 12)[:5] + 0.8 * unit(5, 12, 1)
    vectors = {"queries": queries.astype(np.float32), "documents": documents}
    signs = {name: np.where(v > 0, 1.0, -1.0) for name, v in vectors.items()}
    assert all(np.array_equal(quantize_groups(vectors, "ubinary", None)[name], signs[name]) for name in vectors)
    evalset = retrieval()
    assert score_codes(evalset, vectors, "ubinary") == score_embeddings(
        evalset, quantize_groups(vectors, "ubinary", None)
    )
    # All documents are candidates here, so only int8 rounding lowers the score.
    fine = score_codes(evalset, vectors, "ubinary+rescore")
    near = score_codes(evalset, vectors, "int8")
    assert fine["nDCG@10"] == pytest.approx(near["nDCG@10"], abs=0.05)
    assert near["nDCG@10"] == pytest.approx(score_embeddings(evalset, vectors)["nDCG@10"], abs=0.05)
    assert fine["nDCG@10"] > score_codes(evalset, vectors, "ubinary")["nDCG@10"]
    assert score_codes(evalset, vectors, "float32") == score_embeddings(evalset, vectors)


def test_similarity_of_codes_is_their_cosine_and_is_not_rescored():
    pairs = SimilaritySet("p", ["a"] * 40, ["b"] * 40, np.linspace(0, 5, 40).tolist())
    vectors = {"left": unit(40, 16), "right": unit(40, 16, 1)}
    exact, near = score_embeddings(pairs, vectors)["Spearman"], score_codes(pairs, vectors, "int8")["Spearman"]
    assert near == pytest.approx(exact, abs=0.01)
    assert score_codes(pairs, vectors, "ubinary+rescore") == {}


def test_precisions_of_a_command_line(tmp_path):
    assert parse_precisions("int8, ubinary") == ["int8", "ubinary"]
    with pytest.raises(JasperError, match="got 'int4'.*choose from float32, int8, ubinary, ubinary\\+rescore"):
        parse_precisions("int8,int4")
    assert read_ranges(tmp_path) == {} == read_ranges(tmp_path / "nowhere")
