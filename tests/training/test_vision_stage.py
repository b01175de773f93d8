"""Stage 4: the pooler, images and texts, the weights a vision stage may change, and all four stages end to end."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from jasper_fast.config.load import load_config
from jasper_fast.config.models import StudentConfig, VisionConfig
from jasper_fast.config.stage import AugmentConfig, StageConfig
from jasper_fast.models.student import Student
from jasper_fast.models.vision_tower import pool_tokens
from jasper_fast.utils.errors import ConfigError, JasperError

SIDE = 16
TOWER = {"image_size": SIDE, "patch_size": 4, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
TOWER |= {"num_attention_heads": 2}
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 40), "blue": (30, 40, 210), "yellow": (240, 220, 20)}
PLACES = ("top left", "top right", "bottom left", "bottom right")


def draw(colour: str, place: str, shade: int) -> bytes:
    """Draw a square of a colour in a corner of a grey image, as PNG."""
    from PIL import Image

    pixels = np.full((SIDE, SIDE, 3), 90 + 20 * shade, np.uint8)
    y, x = 8 * place.startswith("bottom"), 8 * place.endswith("right")
    pixels[y : y + 8, x : x + 8] = COLOURS[colour]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="session")
def squares(tmp_path_factory) -> Path:
    """Write 48 images of 16 kinds to a folder, with two captions each, and one unreadable image."""
    folder = tmp_path_factory.mktemp("squares")
    with open(folder / "captions.jsonl", "w") as rows:
        for number, (colour, place, shade) in enumerate((c, p, s) for s in range(3) for c in COLOURS for p in PLACES):
            (folder / f"{number}.png").write_bytes(draw(colour, place, shade))
            words = [f"a {colour} square {place}, {shade}", f"{place} {shade} is {colour}"]
            rows.write(json.dumps({"image": f"{number}.png", "caption": words}) + "\n")
        rows.write(json.dumps({"image": "torn.png", "caption": words}) + "\n")
    (folder / "torn.png").write_bytes((folder / "0.png").read_bytes()[:60])
    return folder


def config_of(bert: Path, **vision) -> StudentConfig:
    vision = {"tower": TOWER, "image_tokens": 5} | vision
    return StudentConfig(model=str(bert), heads=[32, 8], max_length=32, vision=VisionConfig(**vision))


@pytest.fixture(scope="module")
def student(tiny_bert) -> Student:
    torch.manual_seed(3)
    return Student.build(config_of(tiny_bert)).eval()


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(seed)).byte()


def test_the_pooler_is_the_published_one_on_its_shapes():
    states = torch.randn(2, 729, 1152, dtype=torch.float64, requires_grad=True)
    published = torch.nn.AdaptiveAvgPool2d((300, 1536))(states)
    ours = pool_tokens(states, 300, 1536)
    assert ours.shape == (2, 300, 1536) and torch.equal(ours, published)
    first_row, first_column = states[0, :3, 0].mean(), states[0, :3, 0]  # 729 / 300: the first bin holds 3 rows
    assert torch.allclose(ours[0, 0, 0], first_row) and first_column.shape == (3,)
    ours.sum().backward()
    assert states.grad is not None and (states.grad > 0).all()  # every state takes part


@pytest.mark.parametrize("width", [8, 24, 40])  # narrower than, unlike, and wider than the text encoder's 32
def test_any_tower_width_fits_and_gradients_flow(tiny_bert, width):
    student = Student.build(config_of(tiny_bert, tower=TOWER | {"hidden_size": width}))
    pooled = student.pool(pictures(3))
    assert pooled.shape == (3, 32) and pooled.dtype == torch.float32
    student.project(pooled)[8].square().sum().backward()
    missing = [n for n, p in student.vision.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a key's bias moves all scores of a query alike, which softmax does not see
    assert [name for name in missing if not name.endswith("k_proj.bias")] == []


def test_a_picture_is_its_tokens_between_the_marks(student, tiny_bert):
    """The slow way: states of [start, tokens, end], averaged over the tokens alone."""
    pixels = pictures(2)
    states = student.vision.tower(pixel_values=(pixels.float() / 255 - 0.5) / 0.5).last_hidden_state
    tokens = torch.nn.AdaptiveAvgPool2d((5, 32))(states)
    table = student.encoder.get_input_embeddings().weight
    ids = student.tokenizer.convert_tokens_to_ids(["<|image_start|>", "<|image_end|>"])
    for i in range(2):
        whole = torch.cat([table[ids[0]][None], tokens[i], table[ids[1]][None]])[None]
        expected = student.encoder(inputs_embeds=whole).last_hidden_state[0, 1:-1].mean(dim=0)
        assert torch.allclose(student.pool(pixels)[i], expected, atol=1e-5)


@torch.no_grad()
def test_a_vector_does_not_depend_on_what_shares_its_batch(student):
    pixels = pictures(7)
    together = student.pool(pixels)
    for i in range(7):
        assert torch.allclose(student.pool(pixels[i : i + 1])[0], together[i], atol=1e-5)
    bright = pixels.clone()
    bright[1:] = 255
    assert torch.allclose(student.pool(bright)[0], together[0], atol=1e-5)


def test_what_cannot_be_is_refused(tiny_bert, tiny_qwen2, tmp_path):
    with pytest.raises(JasperError, match="give at most 62"):
        Student.build(config_of(tiny_bert, image_tokens=63))
    with pytest.raises(JasperError, match="unknown hiden_size"):
        Student.build(config_of(tiny_bert, tower={"hiden_size": 8}))
    with pytest.raises(JasperError, match="no tower can be built|multiple"):
        Student.build(config_of(tiny_bert, tower=TOWER | {"num_attention_heads": 5}))
    with pytest.raises(JasperError, match="multiple of patch_size"):
        Student.build(config_of(tiny_bert, tower=TOWER | {"patch_size": 5}))
    with pytest.raises(JasperError, match="could not be loaded"):
        Student.build(config_of(tiny_bert, tower=None, model="./no-such-tower"))
    damaged = shutil.copytree(tiny_bert, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(JasperError, match="damaged' could not be loaded"):
        Student.build(config_of(tiny_bert, tower=None, model=str(damaged)))
    text = Student.build(StudentConfig(model=str(tiny_bert), heads=[8], max_length=32))
    with pytest.raises(JasperError, match="reads text alone"):
        text.pool(pictures(1))
    decoder = Student.build(config_of(tiny_qwen2))  # its table has rows to spare or grows
    assert decoder.pool(pictures(2)).shape == (2, 32)


def test_a_tower_or_an_encoder_that_does_not_fit_is_told_before_training(tiny_bert, squares, tmp_path, monkeypatch):
    from transformers import ConvNextConfig, ConvNextModel

    from jasper_fast.training.preflight import check_stages

    sizes = {"image_size": SIDE, "patch_size": 4, "hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2}
    ConvNextModel(ConvNextConfig(**sizes)).save_pretrained(tmp_path / "conv")
    tree = recipe(tmp_path, squares, tiny_bert)
    tree["student"]["vision"] = {"model": str(tmp_path / "conv"), "image_tokens": 4}
    config = load_config(tree)
    with pytest.raises(JasperError, match=r"ConvNextModel gives states of shape \(1, 8, \d, \d\)"):
        check_stages(config, Student.build(config.student), 1)

    config = load_config(recipe(tmp_path, squares, tiny_bert))
    deaf = Student.build(config.student)
    check_stages(config, deaf, 1)
    assert deaf.training
    monkeypatch.setattr(deaf.encoder, "forward", lambda input_ids=None, attention_mask=None: None)
    with pytest.raises(JasperError, match="from SiglipVisionModel through BertModel .*inputs_embeds"):
        check_stages(config, deaf, 1)


def stage(**fields) -> StageConfig:
    fields = {
        "name": "see",
        "train": ["vision.tower.*"],
        "heads": [32, 8],
        "steps": 40,
        "lr": 1e-3,
        "vision": {},
    } | fields
    return StageConfig(**fields)


def test_only_the_tower_may_train(student):
    from jasper_fast.training.stages.base import trained_names

    names = trained_names(student, stage())
    assert names and all(name.startswith("vision.tower.") for name in names)
    last = trained_names(student, stage(train=[], last_layers=1))
    assert (
        0 < len(last) < len(names) and any("layers.1." in n for n in last) and not any("layers.0." in n for n in last)
    )
    assert "vision.marks" in trained_names(student, stage(train=["vision.*"]))
    with pytest.raises(JasperError, match="text side is frozen"):
        trained_names(student, stage(train=["*"]))
    texts = trained_names(student, stage(train=["*"], vision=None))
    assert not any(name.startswith("vision.") for name in texts)


def test_losses_are_averaged_over_heads_each_against_its_own_width():
    from jasper_fast.losses import JasperLoss
    from jasper_fast.losses.contrastive import contrastive_loss
    from jasper_fast.training.stages.losses import VisionLoss

    vectors = {32: torch.randn(6, 32, dtype=torch.float64), 8: torch.randn(6, 8, dtype=torch.float64)}
    targets = {width: F.normalize(torch.randn_like(v), dim=1) for width, v in vectors.items()}
    side_by_side = torch.cat([targets[32], targets[8]], dim=1)
    plain = VisionLoss(stage())(vectors, side_by_side)
    each = [JasperLoss()({width: vectors[width]}, targets[width]) for width in (32, 8)]
    assert torch.allclose(plain.loss, (each[0].loss + each[1].loss) / 2)
    assert torch.allclose(plain.parts["cosine"], (each[0].cosine + each[1].cosine) / 2) and plain.parts["cosine"] > 0
    more = VisionLoss(stage(vision={"contrastive": 2.0}, temperature=0.1))(vectors, side_by_side)
    terms = [contrastive_loss(F.normalize(vectors[w], dim=1), targets[w], 0.1) for w in (32, 8)]
    assert torch.allclose(more.loss, plain.loss + 2.0 * (terms[0] + terms[1]) / 2, rtol=1e-5)
    assert torch.allclose(
        more.parts["contrastive"], ((terms[0] + terms[1]) / 2).to(more.parts["contrastive"].dtype), rtol=1e-5
    )
    assert torch.equal(more.parts["cosine"], plain.parts["cosine"]) and more.parts["neighbourhood"] == 0


def test_balance_is_how_unevenly_captions_choose_pictures():
    from jasper_fast.losses.contrastive import Captions, contrastive_loss, hubness
    from jasper_fast.training.stages.losses import VisionLoss

    scores = torch.randn(5, 7, dtype=torch.float64)
    shares = torch.softmax(scores, dim=0).mean(dim=1)
    assert torch.allclose(hubness(scores), (0.2 * (0.2 / shares).log()).sum())
    assert hubness(torch.ones(5, 7)).abs() < 1e-6 and hubness(torch.eye(5) * 100).abs() < 1e-6
    hub = torch.zeros(5, 7).index_fill_(0, torch.tensor([3]), 9.0)
    assert hubness(hub) > 4
    pictures, every = (F.normalize(torch.randn(n, 4, dtype=torch.float64), dim=1) for n in (3, 9))
    for others in (None, Captions(every, torch.arange(9))):
        at = torch.arange(3)
        plain, more = (contrastive_loss(pictures, every[:3], 0.2, others, at, balance=b) for b in (0.0, 1.5))
        among = every[:3] if others is None else every
        assert torch.allclose(more, plain + 1.5 * hubness(pictures @ among.T / 0.2))
    told = {"contrastive": 2.0, "balance": 1.5}
    found = [VisionLoss(stage(heads=[4], vision=v))({4: pictures}, every[:3]) for v in (told, told | {"balance": 0.0})]
    extra = 1.5 * hubness(pictures @ every[:3].T / 0.05).float()
    torch.testing.assert_close(
        found[0].parts["contrastive"] - found[1].parts["contrastive"], extra, atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(found[0].loss - found[1].loss, (2 * extra).to(found[0].loss.dtype), atol=1e-4, rtol=1e-4)
    for vision, size in (({"balance": 1.0}, 8), (told, 1)):
        with pytest.raises(ValueError, match="vision.balance is part of the contrastive loss, which has weight 0 or a"):
            stage(vision=vision, batch_size=size)


def test_the_contrastive_term_by_hand():
    from jasper_fast.losses.contrastive import contrastive_loss

    pictures, captions = (F.normalize(torch.randn(5, 4, dtype=torch.float64), dim=1) for _ in range(2))
    captions[3] = captions[1]  # the same caption twice: neither is wrong for the other
    expected = 0.0
    for a, b in ((pictures, captions), (captions, pictures)):
        for i in range(5):
            others = [j for j in range(5) if j == i or {i, j} != {1, 3}]
            scores = torch.stack([a[i] @ b[j] / 0.2 for j in others])
            expected += float(torch.logsumexp(scores, 0) - a[i] @ b[i] / 0.2) / 10
    assert abs(float(contrastive_loss(pictures, captions, 0.2)) - expected) < 1e-10
    assert float(contrastive_loss(pictures[:1], captions[:1], 0.2)) == 0.0


def test_a_caption_is_told_from_all_captions_but_those_of_its_picture():
    from jasper_fast.losses.contrastive import Captions, contrastive_loss
    from jasper_fast.training.data import LossInputs
    from jasper_fast.training.stages.losses import VisionLoss

    every = F.normalize(torch.randn(7, 4, dtype=torch.float64), dim=1)
    pictures = F.normalize(torch.randn(3, 4, dtype=torch.float64), dim=1)
    groups = torch.tensor([5, 9, 5, 1, 2, 3, 4])  # the first and the third have the same image
    captions, others = every[[0, 1, 3]], Captions(every, groups)
    expected = 0.0
    for i, (own, left) in enumerate(((0, [1, 3, 4, 5, 6]), (1, [0, 2, 3, 4, 5, 6]), (3, [0, 1, 2, 4, 5, 6]))):
        scores = torch.stack([pictures[i] @ every[j] / 0.2 for j in (own, *left)])
        expected += float(torch.logsumexp(scores, 0) - scores[0]) / 6
        back = captions[i] @ pictures.T / 0.2
        expected += float(torch.logsumexp(back, 0) - back[i]) / 6
    places = torch.tensor([0, 1, 3])
    assert abs(float(contrastive_loss(pictures, captions, 0.2, others, places)) - expected) < 1e-10
    single = others._replace(embeddings=others.embeddings.float())
    plan = stage(heads=[4], vision={"contrastive": 2.0, "among": "all"}, temperature=0.2)
    told = LossInputs(places)
    losses = [float(VisionLoss(plan, captions=known)({4: pictures}, captions, told).loss) for known in (None, single)]
    plain = float(contrastive_loss(pictures.float(), captions.float(), 0.2))
    assert abs(losses[1] - losses[0] - 2.0 * (expected - plain)) < 1e-5
    with pytest.raises(
        ValueError, match="vision.among needs the contrastive loss, which has weight 0. Fix: set it to batch"
    ):
        stage(vision={"among": "all"})


@pytest.mark.parametrize("among", ["batch", "all"])
def test_a_mixed_picture_is_to_find_both_captions(among):
    from jasper_fast.losses.contrastive import Captions, Mixed, contrastive_loss
    from jasper_fast.training.data import LossInputs
    from jasper_fast.training.stages.losses import VisionLoss

    every = F.normalize(torch.randn(9, 4, dtype=torch.float64), dim=1)
    pictures = F.normalize(torch.randn(4, 4, dtype=torch.float64), dim=1)
    own, laid = [0, 1, 2, 3], [1, 2, 0, 3]  # the last is laid over itself
    shares = torch.tensor([[0.5], [0.7], [1.0], [0.8]], dtype=torch.float64)
    others = Captions(every, torch.arange(9)) if among == "all" else None
    expected = 0.0
    for asked, weights in ((own, shares[:, 0]), (laid, 1 - shares[:, 0])):
        for i, right in enumerate(asked):
            forth = pictures[i] @ (every if among == "all" else every[asked]).T / 0.2
            at = right if among == "all" else i
            back = every[right] @ pictures.T / 0.2
            wrong = [k for k in range(4) if k == i or right not in (own[k], laid[k])]
            terms = torch.logsumexp(forth, 0) - forth[at] + torch.logsumexp(back[wrong], 0) - back[i]
            expected += float(weights[i] * terms) / 8
    mixed = Mixed(every[laid], shares, torch.tensor(laid))
    assert abs(float(contrastive_loss(pictures, every[own], 0.2, others, torch.tensor(own), mixed)) - expected) < 1e-10

    plan = stage(heads=[4], vision={"contrastive": 2.0}, temperature=0.2)
    whole = Mixed(every[laid], torch.ones(4, 1, dtype=torch.float64))
    found = [VisionLoss(plan)({4: pictures}, every[own], LossInputs(mixed=both)) for both in (None, whole, mixed)]
    assert torch.allclose(found[0].parts["cosine"], found[1].parts["cosine"]) and torch.allclose(
        found[0].parts["similarity"], found[1].parts["similarity"]
    )
    mean = F.normalize(shares * every[own] + (1 - shares) * every[laid], dim=1)
    assert torch.allclose(found[2].parts["cosine"], VisionLoss(plan)({4: pictures}, mean).parts["cosine"])


def test_all_captions_of_a_stage_are_distinct_and_know_their_pictures(tiny_bert, tmp_path):
    from datasets import Dataset

    from jasper_fast.data.image_dataset import Images
    from jasper_fast.training.pooled import PooledStates
    from jasper_fast.training.stages.vision import CaptionTargets

    table = Dataset.from_dict(
        {"image": [b""] * 4, "captions": [["a", "b"], ["c"], ["b", "d"], ["e"]], "name": list("wxyz")}
    )
    student = Student.build(config_of(tiny_bert))
    states = PooledStates(tmp_path / "states", np.arange(5), "key")  # "e" is never asked for
    states.compute(lambda rows: np.eye(6, 32, dtype=np.float32)[rows], lambda more: None)
    targets = CaptionTargets(student, [32, 8], states, lambda step: np.arange(4), torch.device("cpu"))
    assert targets.places(np.array([0])) is None  # not before they are asked for
    vectors, pictures = targets.all_captions(Images(table, "of a test"))
    assert targets.places(np.array([4, 1, 3, 0, 2])).tolist() == [3, 1, 1, 0, 2]  # "b" is one caption
    assert torch.equal(vectors, targets.read(np.array([0, 1, 2, 4])))  # a, b, c, d
    a, b, c, d = pictures.tolist()
    assert a == b == d != c  # the first and the third image share a caption


def test_views_are_a_function_of_the_step_and_leave_what_they_should():
    from jasper_fast.training.stages.vision import draw_affine_maps, warp_images

    views = AugmentConfig(shift=0.1, scale=0.2, rotate=10.0, flip=True)
    maps = draw_affine_maps(views, (0, 3, 5), 6)
    assert torch.equal(maps, draw_affine_maps(views, (0, 3, 5), 6)) and not torch.equal(
        maps, draw_affine_maps(views, (0, 3, 6), 6)
    )
    pixels = pictures(6)
    same = warp_images(pixels, draw_affine_maps(AugmentConfig(), (0, 0, 0), 6))
    assert torch.allclose(same, pixels.float(), atol=1e-3)
    flipped = warp_images(pixels, torch.tensor([[[-1.0, 0, 0], [0, 1.0, 0]]]).repeat(6, 1, 1))
    assert torch.allclose(flipped, pixels.float().flip(3), atol=1e-3)
    assert set(draw_affine_maps(AugmentConfig(flip=True), (0, 0, 0), 64)[:, 0, 0].tolist()) == {-1.0, 1.0}
    moved = warp_images(pixels, torch.tensor([[[1.0, 0, 2 / SIDE], [0, 1.0, 0]]]).repeat(6, 1, 1))
    assert torch.allclose(moved[..., :-1], pixels.float()[..., 1:], atol=1e-2)  # one pixel to the left


@pytest.mark.parametrize("views", [{"mix": 0.4}, {"mix": 0.4, "shift": 0.1}])
def test_pictures_are_laid_over_others_alike_on_every_rank(views):
    from jasper_fast.distributed.ranks import Ranks
    from jasper_fast.training.stages.vision import draw_affine_maps, draw_partners, image_batches, warp_images

    class Shown:
        def pixels(self, rows, side):
            return pictures(20)[torch.from_numpy(rows)]

    class Targets:
        captions = staticmethod(lambda step: plan(step) + 100)
        places = staticmethod(torch.from_numpy)

        def read(self, numbers):
            return torch.from_numpy(numbers).float()[:, None]

    class Half(Ranks):
        def __init__(self, part):
            super().__init__()
            self.part = part

        def rows(self, total):
            return self.part

    def plan(step):
        return (np.arange(11) * 7 + step) % 20

    plain = stage(vision={"augment": views}, batch_size=11, steps=2)
    student = SimpleNamespace(vision_tower=SimpleNamespace(side=SIDE, image_tokens=1), device=torch.device("cpu"))
    parts = []
    for part in (slice(0, 11), slice(0, 6), slice(6, 11)):
        found = image_batches(plain, (3, 1), 1, plan, Shown(), Targets(), student, Half(part))
        parts.append(next(found)[1])
    whole = parts[0]
    for name in ("pixels", "captions", "shares", "teacher", "rows"):
        values = [
            {
                "pixels": torch.cat(batch.texts.token_ids),
                "captions": batch.inputs.mixed.captions,
                "shares": batch.inputs.mixed.fractions,
                "teacher": batch.teacher,
                "rows": torch.from_numpy(batch.rows),
            }[name]
            for batch in parts
        ]
        assert torch.equal(values[0], torch.cat(values[1:])), name
    for batch in parts:  # the embeddings are those of the captions at these places
        assert torch.equal(batch.inputs.places, batch.teacher[:, 0].long())
        assert torch.equal(batch.inputs.mixed.places, batch.inputs.mixed.captions[:, 0].long())
    for part in (slice(0, 6), slice(6, 11)):  # a loss of each rank's own knows its own captions
        alone = next(
            image_batches(plain, (3, 1), 1, plan, Shown(), Targets(), student, Half(part), across_ranks=False)
        )[1]
        assert sorted(alone.inputs.mixed.captions[:, 0].tolist()) == sorted(alone.teacher[:, 0].tolist())
        assert not torch.equal(alone.inputs.mixed.captions, alone.teacher)
    partners, shares = draw_partners(0.4, (3, 1, 1), 11)
    assert sorted(partners) == list(range(11)) and shares.min() >= 0.5 and shares.max() <= 1 and shares.std() > 0
    assert torch.equal(whole.inputs.mixed.captions[:, 0], torch.from_numpy(plan(1)[partners] + 100).float())
    seen = Shown().pixels(plan(1), SIDE)
    if "shift" in views:
        seen = warp_images(seen, draw_affine_maps(plain.vision.augment, (3, 1, 1), 11))
    share = shares.view(-1, 1, 1, 1)
    assert torch.allclose(torch.cat(whole.texts.token_ids), share * seen + (1 - share) * seen[partners])


def recipe(folder: Path, squares: Path, bert: Path) -> dict:
    """All four stages, in a few seconds."""
    text = {"batch_size": 16, "steps": 6, "lr": 1e-2}
    return {
        "name": "tiny-see",
        "student": {
            "model": str(bert),
            "layers": 2,
            "heads": [32, 8],
            "max_length": 32,
            "vision": {"tower": TOWER, "image_tokens": 4},
        },
        "teachers": [{"model": str(bert), "max_length": 32}],
        "data": {
            "sources": [{"path": str(squares / "captions.jsonl"), "columns": ["caption"]}],
            "cut_share": 0.0,
            "cache": str(folder / "cache"),
        },
        "images": {"sources": [{"path": str(squares)}], "held_out": 12},
        "stages": [
            {"name": "head", "train": ["heads.32.*"], "heads": [32], **text},
            {"name": "distil", "train": ["heads.32.*"], "last_layers": 1, "heads": [32], **text},
            {"name": "reduce", "train": ["*"], "heads": [32, 8], **text},
            {
                "name": "see",
                "train": ["vision.tower.*"],
                "heads": [32, 8],
                "vision": {
                    "contrastive": 5.0,
                    "balance": 0.5,
                    "augment": {"shift": 0.05, "scale": 0.05, "mix": 0.1},
                },
                "average": 0.8,
                "batch_size": 18,
                "micro_batch": 7,
                "steps": 40,
                "lr": 5e-3,
                "temperature": 0.01,
            },
        ],
        "log": {"every": 10},
        "checkpoint": {"every": 8, "keep": 8},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory, squares, tiny_bert):
    """One run of all four stages, left alone; and the text side as it was before the last of them."""
    from jasper_fast.train import train

    folder = tmp_path_factory.mktemp("see")
    tree = recipe(folder, squares, tiny_bert)
    train(tree, out=folder / "run")
    return folder, tree


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def see_losses(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    keep = ("step", "loss", "cosine", "similarity", "relative_similarity", "contrastive", "grad_norm", "lr")
    return [tuple(x[k] for k in keep) for x in lines if x["event"] == "step" and x["stage"] == "see"]


def test_stage_four_moves_the_tower_alone_and_learns(run):
    folder, _ = run
    before, after = weights(folder / "run", 18), weights(folder / "run", 58)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("vision.tower.") for name in moved)
    losses = [line[1] for line in see_losses(folder / "run")]
    assert len(losses) == 40 and np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_the_report_shows_pictures_and_words(run):
    folder, _ = run
    results = json.loads((folder / "run" / "results.json").read_text())["pictures"]
    assert results["pictures"] == 12 and results["captions"] == 24
    rows = {(row["model"].split(":")[0], row["width"]): row["scores"] for row in results["rows"]}
    assert set(rows) == {(model, width) for model in ("student", "floor", "reference") for width in (32, 8)}
    assert all(0 <= rows["reference", 32][f"{way} R@1"] <= 1 for way in ("text → image", "image → text"))
    report = (folder / "run" / "report.md").read_text()
    assert ", 5 contrastive |" in report
    assert re.search(r"- pictures left out: .*torn.png: ", report)
    assert "## Images and captions" in report and "plots/pictures.png" in report and "median rank" in report
    from PIL import Image

    assert min(Image.open(folder / "run" / "plots" / "pictures.png").size) > 300


def test_the_exported_folder_sees_and_reads_in_stock_sentence_transformers(run, squares):
    from sentence_transformers import SentenceTransformer

    import jasper_fast.pictures

    folder, _ = run
    model = jasper_fast.pictures.load(folder / "run")
    files = [str(squares / f"{i}.png") for i in range(5)]
    vectors = model.encode(files)
    assert vectors.shape == (5, 32) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    trained = weights(folder / "run", 58)
    loaded = model.student.state_dict()
    table = "encoder.embeddings.word_embeddings.weight"
    assert torch.equal(loaded.pop(table)[:-2], trained[table][:-2])  # the last two rows are the marks
    assert all(torch.equal(trained[name], value) for name, value in loaded.items())
    words = ["a red square top left, 0", "bottom right 2 is blue"]
    stock = SentenceTransformer(str(folder / "run" / "model"), device="cpu")
    for width in (32, 8):
        assert np.allclose(model.encode_text(words, width), stock.encode(words, task=str(width)), atol=1e-5)
    mixed = model.encode_mixed([files[0], words[0], Path(files[1]), (squares / "2.png").read_bytes(), words[1]], 8)
    apart = model.encode(files[:3], 8)
    assert np.allclose(mixed[[0, 2, 3]], apart, atol=1e-5)
    assert np.allclose(mixed[[1, 4]], model.encode_text(words, 8), atol=1e-6)
    assert model.encode([]).shape == (0, 32)
    with pytest.raises(JasperError, match="expected a list of images, got one str"):
        model.encode(str(squares / "0.png"))
    with pytest.raises(JasperError, match="expected a list of texts, got one"):
        model.encode_text("a red square")
    with pytest.raises(JasperError, match="no width 7"):
        model.encode(files, 7)
    with pytest.raises(JasperError, match="captions.jsonl: not an image"):
        model.encode([squares / "captions.jsonl"])
    card = (folder / "run" / "model" / "README.md").read_text()
    assert "## Images" in card and "jasper_fast.pictures.load" in card


def test_a_stopped_vision_stage_goes_on_bit_for_bit(run, monkeypatch):
    import jasper_fast.train as module
    import jasper_fast.training.stages.base as stages

    folder, tree = run
    honest, calls = stages.learning_rate, []

    def fall(stage, step):
        calls.append(step)
        if len(calls) == 18 + 21:
            raise KeyboardInterrupt  # as a kill would: nothing is saved any more
        return honest(stage, step)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "learning_rate", fall)
        with pytest.raises(KeyboardInterrupt):
            module.train(tree, out=folder / "fallen")
    assert (folder / "fallen" / "checkpoints" / "step-00000034").is_dir()
    module.train(tree, out=folder / "fallen")
    ours, alone = weights(folder / "fallen", 58), weights(folder / "run", 58)
    assert all(torch.equal(ours[name], alone[name]) for name in alone)
    assert see_losses(folder / "fallen") == see_losses(folder / "run")


def test_gradient_caching_and_checkpointing_give_the_same_gradient(student):
    from jasper_fast.models.micro_batches import ImageBatches
    from jasper_fast.training.data import Batch
    from jasper_fast.training.parameters import set_trained
    from jasper_fast.training.stages.base import trained_names
    from jasper_fast.training.stages.losses import VisionLoss
    from jasper_fast.training.step import take_gradients

    pixels = pictures(10)
    teacher = torch.cat([F.normalize(torch.randn(10, w), dim=1) for w in (32, 8)], dim=1)
    found = []
    for caching, checkpointing, size in ((False, False, 10), (True, False, 3), (False, True, 4)):
        plan = stage(gradient_caching=caching, gradient_checkpointing=checkpointing)
        set_trained(student, trained_names(student, plan))
        student.train()
        student.set_gradient_checkpointing(checkpointing)
        batch = Batch(np.arange(10), teacher, ImageBatches(list(pixels.split(size)), 7), None, 70, 70, 0.0)
        take_gradients(student, batch, plan, VisionLoss(plan), torch.device("cpu"), "fp32")
        found.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
        student.set_gradient_checkpointing(False)
    student.eval()
    largest = max(float(gradient.abs().max()) for gradient in found[0].values())
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in other.items():
            assert torch.allclose(gradient, found[0][name], rtol=1e-3, atol=1e-4 * largest), name


def test_a_configuration_that_cannot_see_says_why(run):
    _, tree = run
    without = {key: value for key, value in tree.items() if key != "images"}
    with pytest.raises(ConfigError, match="which needs `student.vision` and `images`"):
        load_config(without)
    with pytest.raises(ConfigError, match="either `model`"):
        load_config(tree, [("student.vision.model", "x")])
    with pytest.raises(ConfigError, match="a vision stage draws random batches"):
        load_config(tree, [("stages.3.batches", "neighbours"), ("stages.3.batch_size", 16)])
    with pytest.raises(ConfigError, match="would stay random"):
        load_config(tree, [("stages.2.heads", [32])])


def test_too_few_pictures_are_told_before_training(run, tmp_path):
    from jasper_fast.train import train

    _, tree = run
    with pytest.raises(JasperError, match=r"a batch of 40 from 36 images"):
        train(tree, out=tmp_path / "bad", overrides=[("stages.3.batch_size", 40)])
    with pytest.raises(JasperError, match=r"too few usable images to hold out 60 \(got 48, expected at least 61\)"):
        train(tree, out=tmp_path / "worse", overrides=[("images.held_out", 60)])
    with pytest.raises(JasperError, match=r"to hold out 12 \(got 0, plus 48 of train_only sources"):
        train(tree, out=tmp_path / "none", overrides=[("images.sources.0.train_only", True)])


def test_sources_that_cannot_be_read_are_told_at_once_before_pictures_are(run, tmp_path):
    from jasper_fast.train import train

    _, tree = run
    wrong = tree | {
        "data": tree["data"] | {"cache": str(tmp_path / "cache")},
        "evaluate": [{"path": str(tmp_path / "no-set")}],
    }
    other = tmp_path / "other.jsonl"
    other.write_text('{"words": "x"}\n')
    wrong["data"]["sources"] = [*tree["data"]["sources"], {"path": str(other)}]
    wrong["images"] = {"sources": [*tree["images"]["sources"], {"path": str(tmp_path / "none.zip")}]}
    with pytest.raises(JasperError) as told:
        train(wrong, out=tmp_path / "run")
    for said in (
        "3 problems",
        "no-set': no such file",
        "other.jsonl, line 1: no column 'text'",
        "none.zip: no such file",
    ):
        assert said in str(told.value)
    assert not list((tmp_path / "cache").glob("images-*"))


def test_a_tower_learns_to_tell_pictures_apart(tiny_bert):
    from jasper_fast.evaluation.images import retrieval_scores
    from jasper_fast.models.micro_batches import ImageBatches
    from jasper_fast.training.data import Batch
    from jasper_fast.training.optim import make_optimizer
    from jasper_fast.training.parameters import set_trained
    from jasper_fast.training.stages.base import trained_names
    from jasper_fast.training.stages.losses import VisionLoss
    from jasper_fast.training.step import take_gradients

    student = Student.build(config_of(tiny_bert, image_tokens=2)).train()
    plan = stage(heads=[32], lr=1e-2, vision={"contrastive": 5.0}, temperature=0.1)
    set_trained(student, trained_names(student, plan))
    optimizer, loss_of = make_optimizer(student, plan), VisionLoss(plan)
    pixels, teacher = pictures(8), F.normalize(torch.randn(8, 32), dim=1)
    batch = Batch(np.arange(8), teacher, ImageBatches([pixels], 4), None, 32, 32, 0.0)
    for _ in range(80):
        _, vectors = take_gradients(student, batch, plan, loss_of, torch.device("cpu"), "fp32")
        optimizer.step()
        optimizer.zero_grad()
    scores = retrieval_scores(F.normalize(vectors[32].detach(), dim=1).numpy(), teacher.numpy(), np.arange(8))
    assert scores["text → image R@1"] == scores["image → text R@1"] == 1.0


def test_recall_by_hand():
    from jasper_fast.evaluation.images import retrieval_scores

    pictures = np.eye(3, dtype=np.float32)
    captions = np.array([[0.9, 0.1, 0], [0, 1, 0.5], [0, 0.8, 0.7], [0, 0, 1]], np.float32)
    own = np.array(
        [0, 1, 2, 2]
    )  # the third caption finds its image second, and every image finds one of its captions first
    scores = retrieval_scores(pictures, captions, own)
    assert scores["text → image R@1"] == 0.75 and scores["text → image median rank"] == 1
    assert scores["image → text R@1"] == 1.0
    tied = retrieval_scores(np.ones((4, 2), np.float32), np.ones((4, 2), np.float32), np.arange(4))
    assert tied["text → image R@1"] == tied["image → text R@1"] == 0.0  # a collapsed model finds nothing
    assert tied["text → image median rank"] == 4


def test_the_reference_leaves_out_the_caption_that_asks():
    from jasper_fast.evaluation.images import REFERENCE, reference_scores, retrieval_scores
    from jasper_fast.reporting.tables import scores_markdown

    captions = np.random.default_rng(0).standard_normal((9, 4))
    captions = (captions / np.linalg.norm(captions, axis=1, keepdims=True)).astype(np.float32)
    assert reference_scores(captions, np.arange(9), 9) == {}
    own = np.array([0, 0, 0, 1, 1, 2, 3, 3, 3])  # image 2 has one caption, so it is never a query
    members = [np.flatnonzero(own == picture) for picture in range(4)]

    def vector(rows: np.ndarray) -> np.ndarray:
        return captions[rows].sum(axis=0) / np.linalg.norm(captions[rows].sum(axis=0))

    to_image, to_text = [], []
    for picture in (0, 1, 3):
        best = 99
        for asks in members[picture]:
            without = vector(members[picture][members[picture] != asks])
            right = without @ captions[asks]
            rivals = [vector(members[other]) @ captions[asks] for other in range(4) if other != picture]
            to_image.append(1 + sum(score >= right for score in rivals))
            best = min(best, 1 + sum(without @ captions[other] >= right for other in range(9) if own[other] != picture))
        to_text.append(best)
    found = reference_scores(captions, own, 4)
    assert found["text → image median rank"] == np.median(to_image)
    assert found["text → image R@1"] == np.mean(np.array(to_image) == 1) < 1
    assert found["image → text R@1"] == np.mean(np.array(to_text) == 1)
    assert found.keys() == retrieval_scores(captions, captions, np.arange(9)).keys()
    table = scores_markdown({"rows": [{"model": REFERENCE, "width": 4, "scores": {}}]})
    assert table.splitlines()[-1] == f"| {REFERENCE} | 4 |" + " – |" * 8


def test_results_of_the_version_that_called_the_reference_a_ceiling_still_render():
    from jasper_fast.evaluation.images import REFERENCE
    from jasper_fast.reporting.tables import scores_markdown

    for file in sorted((Path(__file__).parents[2] / "docs" / "runs" / "glyphs").glob("results*.json")):
        results = json.loads(file.read_text(encoding="utf-8"))["pictures"]
        table = scores_markdown(results)
        assert "ceiling" not in table and table.count(f"| {REFERENCE} |") == 3
        rates = {row["model"]: row["scores"]["text → image R@1"] for row in results["rows"] if row["width"] == 384}
        assert rates["student"] > rates["ceiling: its other captions"]  # so it is no ceiling


def test_the_floor_is_what_ridge_regression_gives():
    from sklearn.linear_model import Ridge

    from jasper_fast.evaluation.images import RIDGES, fit_ridge

    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(60, 9)) * 3 + 1, generator.normal(size=(60, 4))
    x[:, 0] += y[:, 0]
    guess = fit_ridge(x, y)(x[:5])
    scaled = (x - x.mean(0)) / (x.std(0) + 1e-6)
    candidates = []
    for ridge in RIDGES:
        fitted = Ridge(alpha=ridge, fit_intercept=False).fit(scaled, y - y.mean(0))
        whole = fitted.predict(scaled[:5]) + y.mean(0)
        candidates.append(whole / np.linalg.norm(whole, axis=1, keepdims=True))
    assert min(np.abs(guess - other).max() for other in candidates) < 1e-5


def vision_gradient(bert: str, ranks, pixels: torch.Tensor, teacher: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute gradient and losses of one step of 11 images over all ranks, in float64."""
    from jasper_fast.losses.contrastive import Captions, Mixed
    from jasper_fast.models.micro_batches import ImageBatches
    from jasper_fast.training.data import Batch, LossInputs
    from jasper_fast.training.parameters import set_trained
    from jasper_fast.training.stages.base import trained_names
    from jasper_fast.training.stages.losses import VisionLoss
    from jasper_fast.training.step import take_gradients

    torch.manual_seed(3)
    student = Student.build(config_of(Path(bert))).double().train()
    among = {"contrastive": 3.0, "balance": 0.5, "among": "all"}
    plan = stage(vision=among, batch_size=11, gradient_caching=True)
    set_trained(student, trained_names(student, plan))
    mine, counts = ranks.rows(11), ranks.counts(11)
    places, partners, shares = torch.arange(11).flip(0), torch.arange(11).roll(3), torch.linspace(0.5, 1.0, 11).double()
    mixed = Mixed(teacher[partners][mine], shares[mine, None], places[partners][mine])
    others = Captions(torch.cat([teacher.flip(0), -teacher]).float(), torch.arange(22))
    passes = ImageBatches(list(pixels[mine].split(4)), 7)
    batch = Batch(np.arange(11)[mine], teacher[mine], passes, None, 0, 0, 0.0, LossInputs(places[mine], mixed))
    loss_of = VisionLoss(plan, ranks.group, counts if ranks.world > 1 else None, others)
    output, _ = take_gradients(student, batch, plan, loss_of, torch.device("cpu"), "fp32")
    ranks.average_gradients(student.parameters())
    found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return found | {"loss": output.loss.detach()}


def gradient_rank(bert: str, given: dict[str, torch.Tensor], out: str) -> None:
    from jasper_fast.distributed.ranks import join_ranks

    with join_ranks(60.0) as ranks:
        found = vision_gradient(bert, ranks, given["pixels"], given["teacher"])
        torch.save(found, f"{out}/gradient-{ranks.rank}.pt")


def test_the_gradient_of_two_processes_is_that_of_one(tiny_bert, tmp_path):
    from jasper_fast.distributed.ranks import Ranks
    from tests.helpers.ranks import end, start

    generator = torch.Generator().manual_seed(1)
    sides = [torch.randn(11, width, generator=generator, dtype=torch.float64) for width in (32, 8)]
    given = {"pixels": pictures(11), "teacher": torch.cat([F.normalize(side, dim=1) for side in sides], dim=1)}
    processes = start(2, gradient_rank, str(tiny_bert), given, str(tmp_path))
    alone = vision_gradient(str(tiny_bert), Ranks(), given["pixels"], given["teacher"])
    assert end(processes) == [0, 0]
    for rank in range(2):
        found = torch.load(tmp_path / f"gradient-{rank}.pt")
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            close = max(1e-9, 1e-7 * value.abs().max().item())  # the contrastive term is float32
            assert torch.allclose(found[name], value, rtol=1e-6, atol=close), name


def test_two_processes_see_as_one(run, tmp_path):
    from tests.helpers.ranks import end, start
    from tests.helpers.runs import run_in_child

    folder, tree = run
    assert end(start(2, run_in_child, tree, str(tmp_path / "run"))) == [0, 0]
    together, by_itself = see_losses(tmp_path / "run"), see_losses(folder / "run")
    assert np.allclose(np.array(together)[:10], np.array(by_itself)[:10], rtol=1e-2, atol=1e-4)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["pictures"]["pictures"] == 12


def test_pictures_of_a_folder_are_found_by_words(run, squares, tmp_path, capsys):
    import shutil

    from jasper_fast.pictures import load
    from jasper_fast.search import main

    folder, _ = run
    (tmp_path / "some" / "below").mkdir(parents=True)
    for i in range(6):
        shutil.copy(squares / f"{i}.png", tmp_path / "some" / ("below" if i % 2 else ".") / f"{i}.png")
    (tmp_path / "some" / "broken.png").write_bytes(b"%PDF-1.4")
    out = str(tmp_path / "index")
    main(["build", str(folder / "run"), str(tmp_path / "some"), "--pictures", "--out", out, "--width", "8"])
    said = capsys.readouterr().out
    assert "broken.png: not an image but a PDF" in said and "6 images in " in said
    main(["ask", out, "a red square top left, 0", "-k", "6", "--json"])
    hits = json.loads(capsys.readouterr().out)["hits"]
    model = load(folder / "run")
    scores = model.encode([hit["text"] for hit in hits], 8) @ model.encode_text(["a red square top left, 0"], 8)[0]
    assert len(hits) == 6 and np.allclose(scores, [hit["score"] for hit in hits], atol=1e-5)
    shutil.copy(squares / "6.png", tmp_path / "some" / "6.png")
    main(["add", out, str(tmp_path / "some"), "--pictures"])
    assert "1 new images in " in capsys.readouterr().out
    main(["ask", out, "a red square top left, 0", "-k", "9", "--json"])
    more = json.loads(capsys.readouterr().out)["hits"]
    assert [hit for hit in more if hit["id"] < 6] == hits and len(more) == 7
    (tmp_path / "some.zip").touch()
    model = "no-such-model"  # images are checked before the model
    for place, says in (
        ("index", "no readable images"),
        ("absent", "there is no such folder"),
        ("some.zip", "this is a file. Fix: give a folder of images, unpacked"),
    ):
        with pytest.raises(JasperError, match=says):
            main(["build", model, str(tmp_path / place), "--pictures", "--out", str(tmp_path / "other")])
