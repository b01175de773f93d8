"""Vision tower of a student, with a parameter-free pooler and the image-start and image-end embeddings.

An image becomes ``image_tokens`` input embeddings of the text encoder, between image-start and image-end. The pooler
resamples the tower's token matrix along both axes (arXiv 2412.19048: 729 × 1152 to 300 × 1536). Any tower therefore
fits any text encoder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jasper_fast.config.models import VisionConfig
from jasper_fast.models.backbone import disable_dropout, position_limit
from jasper_fast.models.layers import layer_list
from jasper_fast.models.loading import load_checked, without_bars
from jasper_fast.utils.errors import JasperError

FINAL_NORMS = ("post_layernorm", "layernorm", "norm")  # names of the norm after the last layer
HALF = [0.5, 0.5, 0.5]  # SigLIP's mean and standard deviation per channel


class VisionTower(nn.Module):
    """Map from images to input embeddings of a text encoder, with parameters ``tower.…`` and ``marks``.

    Args:
        tower: Hugging Face vision model that returns ``last_hidden_state`` (B, P, W).
        boundary_embeddings: (2, H) embeddings of image-start and image-end.
        image_tokens: number N of input embeddings per image.
        rows: ids of image-start and image-end, which are their rows in the text encoder's embedding table.
        mean: mean of each channel, for pixels scaled to 0..1.
        std: standard deviation of each channel, for pixels scaled to 0..1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        tower: nn.Module,
        boundary_embeddings: Tensor,
        image_tokens: int,
        rows: list[int],
        mean: list[float] = HALF,
        std: list[float] = HALF,
    ) -> None:
        super().__init__()
        self.tower: Any = tower
        self.marks = nn.Parameter(boundary_embeddings.clone())
        self.image_tokens = image_tokens
        self.rows = rows
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @classmethod
    def build(cls, config: VisionConfig, encoder: Any, tokenizer: Any) -> VisionTower:
        """Load or initialise the tower, and add image-start and image-end to the text encoder's vocabulary if needed.

        Args:
            config: the ``student.vision`` section of a configuration.
            encoder: Hugging Face text encoder.
            tokenizer: tokenizer of the text encoder.

        Raises:
            JasperError: The tower is missing, its sizes are impossible, or the text encoder has too few positions.
        """
        limit = position_limit(encoder)
        if limit is not None and config.image_tokens + 2 > limit:
            raise JasperError(
                f"student.vision.image_tokens: the text encoder has {limit} positions, and two are for image-start and "
                f"image-end (got {config.image_tokens}). Fix: give at most {limit - 2}"
            )
        tower = load_tower(config) if config.model is not None else new_tower(config.tower or {})
        mean, std = _pixel_statistics(config)
        rows = add_boundary_tokens(config, encoder, tokenizer)
        boundary_embeddings = encoder.get_input_embeddings().weight.detach()[rows]  # (2, H)
        return cls(tower, boundary_embeddings, config.image_tokens, rows, mean, std)

    @property
    def side(self) -> int:
        """Side of the square input images, in pixels."""
        return int(self.tower.config.image_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the input embeddings of images.

        Args:
            pixels: (B, 3, side, side), uint8, or float with values 0..255.

        Returns:
            (B, N + 2, H) image-start, the image's tokens, and image-end.

        Raises:
            JasperError: The tower does not return one state per patch.
        """
        pixels = (pixels.float() / 255.0 - self.mean) / self.std
        if self.tower.config.num_channels == 1:  # greyscale tower
            pixels = pixels.mean(dim=1, keepdim=True)
        states = self.tower(pixel_values=pixels).last_hidden_state  # (B, P, W)
        if states.ndim != 3:
            raise JasperError(
                f"student.vision: the tower {type(self.tower).__name__} gives states of shape {tuple(states.shape)} "
                "(expected (images, patches, width)). Fix: choose a transformer (SigLIP, SigLIP 2, CLIP, ViT)"
            )
        tokens = pool_tokens(states, self.image_tokens, self.marks.shape[1])  # (B, N, H)
        boundary = self.marks.to(tokens.dtype).expand(len(tokens), -1, -1)  # (B, 2, H)
        return torch.cat([boundary[:, :1], tokens, boundary[:, 1:]], dim=1)

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Switch gradient checkpointing of the tower on or off. A tower without support ignores it."""
        if on and self.tower.supports_gradient_checkpointing:
            self.tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.tower.disable_input_require_grads()
        elif self.tower.supports_gradient_checkpointing:
            self.tower.gradient_checkpointing_disable()

    @property
    def num_layers(self) -> int:
        """Number of layers of the tower, 0 if it has no single list of layers."""
        path = layer_list(self.tower)
        return len(self.tower.get_submodule(path)) if path is not None else 0

    def layer_parameters(self, last_n: int) -> list[str]:
        """Return the parameter names of the tower's last ``last_n`` layers and of its final norm.

        Args:
            last_n: number of layers.

        Raises:
            JasperError: The tower has fewer layers, or no single list of layers.
        """
        path, count = layer_list(self.tower), self.num_layers
        if last_n > count:
            raise JasperError(
                f"last_layers: the vision tower has a list of {count} layers (got {last_n}). Fix: give at most {count}"
            )
        prefixes = [f"{path}.{i}." for i in range(count - last_n, count)]
        prefixes += [
            f"{name}."
            for name, module in self.tower.named_modules()
            if name.rpartition(".")[2] in FINAL_NORMS and not name.startswith(f"{path}.")
        ]
        return [f"vision.tower.{name}" for name, _ in self.tower.named_parameters() if name.startswith(tuple(prefixes))]

    @torch.no_grad()
    def store_boundary_embeddings(self, encoder: Any) -> None:
        """Copy the trained image-start and image-end embeddings into the text encoder's table, to be saved with it."""
        encoder.get_input_embeddings().weight[self.rows] = self.marks.to(encoder.dtype)

    def save(self, folder: Path) -> None:
        """Write the tower as a Hugging Face folder that ``student.vision.model`` and ``AutoModel`` can load.

        Args:
            folder: folder to create.

        Raises:
            FileExistsError: The folder exists.
        """
        folder.mkdir()
        with without_bars():
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
    """Resample a token matrix along both axes by averages, without parameters.

    Args:
        states: (B, P, W) states of the vision tower.
        tokens: number of output tokens.
        width: output width.

    Returns:
        (B, tokens, width)
    """
    return F.adaptive_avg_pool2d(states, (tokens, width))


def add_boundary_tokens(config: VisionConfig, encoder: Any, tokenizer: Any) -> list[int]:
    """Add image-start and image-end to the tokenizer and to the text encoder's embedding table if they are missing.

    New rows do not depend on torch's current seed.

    Args:
        config: the ``student.vision`` section of a configuration.
        encoder: Hugging Face text encoder.
        tokenizer: tokenizer of the text encoder.

    Returns:
        The ids of image-start and image-end.
    """
    names = [config.start_token, config.end_token]
    tokenizer.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)
    ids = [int(i) for i in tokenizer.convert_tokens_to_ids(names)]
    table = encoder.get_input_embeddings()
    old_rows = table.num_embeddings
    if max(ids) >= old_rows:
        weight = table.weight.detach()
        noise = torch.randn(max(ids) + 1 - old_rows, weight.shape[1], generator=torch.Generator().manual_seed(0))
        rows = weight.mean(dim=0) + noise * weight.std(dim=0)
        encoder.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        with torch.no_grad():
            encoder.get_input_embeddings().weight[old_rows:] = rows
    return ids


def new_tower(fields: dict[str, float]) -> Any:
    """Build a SigLIP vision tower with random weights from torch's current seed.

    Args:
        fields: fields of a SiglipVisionConfig, e.g. image_size, patch_size, hidden_size, num_hidden_layers.

    Raises:
        JasperError: A field is unknown, or the sizes do not fit each other.
    """
    from transformers import SiglipVisionConfig, SiglipVisionModel

    plain = SiglipVisionConfig(vision_use_head=False)
    unknown = sorted(set(fields) - set(plain.to_dict()))
    if unknown:
        raise JasperError(
            f"student.vision.tower: unknown {', '.join(unknown)}. Fix: use fields of a SigLIP tower (image_size, "
            "patch_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size)"
        )
    sizes = {name: int(v) if float(v).is_integer() and name != "layer_norm_eps" else v for name, v in fields.items()}
    try:
        settings = SiglipVisionConfig(**sizes, vision_use_head=False)
        disable_dropout(settings)
        tower = SiglipVisionModel(settings)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise JasperError(f"student.vision.tower: no tower can be built from {sizes} ({error})") from error
    if settings.image_size % settings.patch_size:
        raise JasperError(
            f"student.vision.tower: image_size {settings.image_size} is not a multiple of patch_size "
            f"{settings.patch_size}, so the image's edge would be lost"
        )
    return tower.train()


def load_tower(config: VisionConfig) -> Any:
    """Load the vision model of a folder or hub name, without dropout and pooling head.

    Args:
        config: the ``student.vision`` section of a configuration, with ``model`` set.

    Returns:
        The Hugging Face vision model, float32, in training mode.

    Raises:
        JasperError: The model is missing, needs its own code without permission, or has no vision model with a fixed
            image size.
    """
    from jasper_fast.models.hub import CANNOT_LOAD
    from jasper_fast.utils.names import first_line

    try:
        model = _load_model(config)
    except CANNOT_LOAD as error:
        if "trust_remote_code" in str(error):
            raise JasperError(
                f"student.vision.model {config.model!r}: the model needs its own code, which does not run by default. "
                "Fix: read the code, then set student.vision.trust_remote_code: true"
            ) from error
        raise JasperError(
            f"student.vision.model {config.model!r} could not be loaded ({first_line(error)}). Fix: give a folder or a "
            "hub name such as google/siglip-so400m-patch14-384, or `tower` for a new one"
        ) from error
    tower = getattr(model, "vision_model", model)
    if isinstance(getattr(tower, "head", None), nn.Module):
        tower.head, tower.use_head = None, False
    if not isinstance(getattr(tower.config, "image_size", None), int):
        raise JasperError(
            f"student.vision.model {config.model!r}: {type(tower).__name__} has no single image_size. Fix: choose a "
            "tower with a fixed size (SigLIP, SigLIP 2 other than naflex, CLIP, ViT)"
        )
    return tower.train()


def _load_model(config: VisionConfig) -> Any:
    """Load the whole model that holds the tower."""
    from transformers import AutoConfig, AutoModel

    from jasper_fast.models.hub import resolve_model

    source = resolve_model(str(config.model))
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    settings = AutoConfig.from_pretrained(source, **options)
    for part in (settings, getattr(settings, "vision_config", settings)):
        disable_dropout(part)
        if hasattr(part, "vision_use_head"):
            part.vision_use_head = False  # our pooler takes all tokens, so a head would be saved but not trained
    with torch.random.fork_rng(devices=[]):
        return load_checked(
            lambda more: AutoModel.from_pretrained(source, config=settings, dtype=torch.float32, **options, **more),
            f"student.vision.model {config.model!r}",
        )


def _pixel_statistics(config: VisionConfig) -> tuple[list[float], list[float]]:
    """Read the pixel mean and standard deviation of a loaded tower's preprocessor, or return SigLIP's."""
    if config.model is None:
        return HALF, HALF
    from transformers.utils.hub import cached_file

    from jasper_fast.models.hub import resolve_model

    file = cached_file(
        resolve_model(config.model),
        "preprocessor_config.json",
        revision=config.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    settings = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    return settings.get("image_mean", HALF), settings.get("image_std", HALF)
