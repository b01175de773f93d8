"""The student's eyes: a vision tower, a pooler without parameters, and the two embeddings around a picture.

A picture becomes ``image_tokens`` input embeddings of the text encoder, between an image-start and an image-end token.
The pooler resamples the tower's token matrix along both axes at once (arXiv 2412.19048: 729 × 1152 to 300 × 1536), so
any tower fits any text encoder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jasper_fast.config import VisionConfig
from jasper_fast.errors import JasperError
from jasper_fast.loading import load_checked
from jasper_fast.pretrained import layer_list, position_limit, switch_dropout_off

FINAL_NORMS = ("post_layernorm", "layernorm", "norm")  # what towers call the norm after their last layer
HALF = [0.5, 0.5, 0.5]


class VisionTower(nn.Module):
    """Pictures to input embeddings of a text encoder; parameters ``tower.…`` and ``marks``.

    Args:
        tower: a Hugging Face vision model that returns ``last_hidden_state`` (B, P, W).
        marks: (2, H) embeddings of image-start and image-end.
        image_tokens: what a picture becomes, N.
        rows: of the text encoder's embedding table that the marks were read from and are saved in.
        mean, std: of the pixels per channel, in shares of white.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        tower: nn.Module,
        marks: Tensor,
        image_tokens: int,
        rows: list[int],
        mean: list[float] = HALF,
        std: list[float] = HALF,
    ) -> None:
        super().__init__()
        self.tower: Any = tower
        self.marks = nn.Parameter(marks.clone())
        self.image_tokens = image_tokens
        self.rows = rows
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @classmethod
    def build(cls, config: VisionConfig, encoder: Any, tokenizer: Any) -> VisionTower:
        """Load or make the tower, and give the text encoder's table rows for the two marks where it has none.

        Raises:
            JasperError: no such tower, impossible sizes, or the text encoder has too few positions.
        """
        limit = position_limit(encoder)
        if limit is not None and config.image_tokens + 2 > limit:
            raise JasperError(
                f"student.vision.image_tokens is {config.image_tokens}, and two marks; the text encoder has {limit} "
                f"positions: give at most {limit - 2}"
            )
        tower = load_tower(config) if config.model is not None else new_tower(config.tower or {})
        mean, std = _pixel_statistics(config)
        rows = add_marks(config, encoder, tokenizer)
        marks = encoder.get_input_embeddings().weight.detach()[rows]  # (2, H)
        return cls(tower, marks, config.image_tokens, rows, mean, std)

    @property
    def side(self) -> int:
        """Of the square pictures that the tower takes, in pixels."""
        return int(self.tower.config.image_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Input embeddings of pictures.

        Args:
            pixels: (B, 3, side, side), uint8, or float of the same range 0..255.

        Returns:
            (B, N + 2, H): image-start, the picture's tokens, image-end.

        Raises:
            JasperError: the tower gives something else than one row of states for each patch.
        """
        pixels = (pixels.float() / 255.0 - self.mean) / self.std
        if self.tower.config.num_channels == 1:  # a tower that sees in grey
            pixels = pixels.mean(dim=1, keepdim=True)
        states = self.tower(pixel_values=pixels).last_hidden_state  # (B, P, W)
        if states.ndim != 3:
            raise JasperError(
                f"the vision tower {type(self.tower).__name__} gives states of shape {tuple(states.shape)}; expected "
                "(pictures, patches, width): choose a transformer (SigLIP, SigLIP 2, CLIP, ViT)"
            )
        tokens = pool_tokens(states, self.image_tokens, self.marks.shape[1])  # (B, N, H)
        marks = self.marks.to(tokens.dtype).expand(len(tokens), -1, -1)  # (B, 2, H)
        return torch.cat([marks[:, :1], tokens, marks[:, 1:]], dim=1)

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Recompute the tower's layers in the backward pass, where it can, or stop doing so."""
        if on and self.tower.supports_gradient_checkpointing:
            self.tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.tower.disable_input_require_grads()
        elif self.tower.supports_gradient_checkpointing:
            self.tower.gradient_checkpointing_disable()

    def layer_parameters(self, last_n: int) -> list[str]:
        """Names of the parameters of the tower's last ``last_n`` layers, and of the norm after the last one.

        Raises:
            JasperError: there are fewer layers than that, or they are hidden.
        """
        path = layer_list(self.tower)
        count = len(self.tower.get_submodule(path)) if path is not None else 0
        if last_n > count:
            raise JasperError(f"last_layers is {last_n}, but the vision tower shows {count} layers; give at most that")
        kept = [f"{path}.{i}." for i in range(count - last_n, count)]
        kept += [
            f"{name}."
            for name, module in self.tower.named_modules()
            if name.rpartition(".")[2] in FINAL_NORMS and not name.startswith(f"{path}.")
        ]
        return [f"vision.tower.{name}" for name, _ in self.tower.named_parameters() if name.startswith(tuple(kept))]

    @torch.no_grad()
    def store_marks(self, encoder: Any) -> None:
        """Put the marks, as they were trained, into their rows of the text encoder's table, to be saved with it."""
        encoder.get_input_embeddings().weight[self.rows] = self.marks.to(encoder.dtype)

    def save(self, folder: Path) -> None:
        """Write the tower as a Hugging Face folder that ``student.vision.model`` and ``AutoModel`` can name."""
        folder.mkdir()
        self.tower.save_pretrained(folder)
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        processor = {
            "image_processor_type": "SiglipImageProcessor",
            "do_resize": True,
            "size": {"height": self.side, "width": self.side},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": mean,
            "image_std": std,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


def pool_tokens(states: Tensor, tokens: int, width: int) -> Tensor:
    """Resample a token matrix along both axes by averages, (B, P, W) -> (B, tokens, width); no parameters."""
    return F.adaptive_avg_pool2d(states, (tokens, width))


def add_marks(config: VisionConfig, encoder: Any, tokenizer: Any) -> list[int]:
    """Ids of image-start and image-end; what the tokenizer or the embedding table lacks is added, always alike."""
    names = [config.start_token, config.end_token]
    tokenizer.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)
    ids = [int(i) for i in tokenizer.convert_tokens_to_ids(names)]
    table = encoder.get_input_embeddings()
    known = table.num_embeddings
    if max(ids) >= known:
        weight = table.weight.detach()
        noise = torch.randn(max(ids) + 1 - known, weight.shape[1], generator=torch.Generator().manual_seed(0))
        rows = weight.mean(dim=0) + noise * weight.std(dim=0)
        encoder.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        with torch.no_grad():
            encoder.get_input_embeddings().weight[known:] = rows
    return ids


def new_tower(fields: dict[str, float]) -> Any:
    """A SigLIP vision tower with random weights from torch's current seed.

    Args:
        fields: of a SiglipVisionConfig, e.g. image_size, patch_size, hidden_size, num_hidden_layers.

    Raises:
        JasperError: an unknown field, or sizes that do not fit each other.
    """
    from transformers import SiglipVisionConfig, SiglipVisionModel

    plain = SiglipVisionConfig(vision_use_head=False)
    unknown = sorted(set(fields) - set(plain.to_dict()))
    if unknown:
        raise JasperError(
            f"student.vision.tower: unknown {', '.join(unknown)}; a SigLIP tower has image_size, patch_size, "
            "hidden_size, num_hidden_layers, num_attention_heads, intermediate_size"
        )
    whole = {name: int(v) if float(v).is_integer() and name != "layer_norm_eps" else v for name, v in fields.items()}
    try:
        settings = SiglipVisionConfig(**whole, vision_use_head=False)
        switch_dropout_off(settings)
        tower = SiglipVisionModel(settings)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise JasperError(f"student.vision.tower {whole} makes no tower: {error}") from error
    if settings.image_size % settings.patch_size:
        raise JasperError(
            f"student.vision.tower: image_size {settings.image_size} is not a multiple of patch_size "
            f"{settings.patch_size}, so its edge would not be seen"
        )
    return tower.train()


def load_tower(config: VisionConfig) -> Any:
    """The vision model of a folder or hub name, float32, without dropout and without a pooling head.

    Raises:
        JasperError: not found, it brings code of its own that was not allowed, or it has no vision model of a fixed
            image size.
    """
    from transformers import AutoConfig, AutoModel

    from jasper_fast.models import CANNOT_LOAD, first_line, resolve_model

    source = resolve_model(str(config.model))
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        settings = AutoConfig.from_pretrained(source, **options)
        for part in (settings, getattr(settings, "vision_config", settings)):
            switch_dropout_off(part)
            if hasattr(part, "vision_use_head"):
                part.vision_use_head = False  # the pooler takes all tokens; a head would be saved and not trained
        with torch.random.fork_rng(devices=[]):
            model = load_checked(
                lambda more: AutoModel.from_pretrained(source, config=settings, dtype=torch.float32, **options, **more),
                f"student.vision.model {config.model!r}",
            )
    except CANNOT_LOAD as error:
        if "trust_remote_code" in str(error):
            raise JasperError(
                f"student.vision.model {config.model!r} brings code of its own, which is not run unless asked for: "
                "read it, then set student.vision.trust_remote_code: true"
            ) from error
        raise JasperError(
            f"student.vision.model {config.model!r} could not be loaded ({first_line(error)}); give a folder or a "
            "hub name such as google/siglip-so400m-patch14-384, or `tower` for one from scratch"
        ) from error
    tower = getattr(model, "vision_model", model)
    if isinstance(getattr(tower, "head", None), nn.Module):
        tower.head, tower.use_head = None, False
    if not isinstance(getattr(tower.config, "image_size", None), int):
        raise JasperError(
            f"student.vision.model {config.model!r}: {type(tower).__name__} names no single image_size; choose a tower "
            "of fixed size (SigLIP, SigLIP 2 other than naflex, CLIP, ViT)"
        )
    return tower.train()


def _pixel_statistics(config: VisionConfig) -> tuple[list[float], list[float]]:
    """Mean and deviation that a loaded tower's own preprocessor names; SigLIP's where there is none."""
    if config.model is None:
        return HALF, HALF
    from transformers.utils.hub import cached_file

    from jasper_fast.models import resolve_model

    found = cached_file(
        resolve_model(config.model),
        "preprocessor_config.json",
        revision=config.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    settings = json.loads(Path(found).read_text(encoding="utf-8")) if found else {}
    return settings.get("image_mean", HALF), settings.get("image_std", HALF)
